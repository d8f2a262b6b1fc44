"""Which of many parts cause a failure: delta debugging.

`minimal` is ddmin of Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", IEEE TSE 28(2), 2002:
try ever smaller parts of the list, and the list without each of them; keep whatever still fails. One culprit among n is
found in about 2·log₂(n) tests; the worst case is quadratic. The result is 1-minimal: it fails, and without any one
element it does not.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

Part = TypeVar("Part")
Fails = Callable[[tuple[Part, ...]], bool]


def minimal(parts: Sequence[Part], fails: Fails[Part]) -> tuple[Part, ...]:
    """A 1-minimal failing part of `parts`, in their order. `fails(parts)` must hold."""
    current, count = tuple(parts), 2
    while len(current) > 1:
        chunks = _chunks(current, count)
        chunk = next((chunk for chunk in chunks if fails(chunk)), None)
        if chunk is not None:
            current, count = chunk, 2
            continue
        rests = (without(current, chunk) for chunk in chunks) if count > 2 else ()  # of two, the rests are the chunks
        rest = next((rest for rest in rests if fails(rest)), None)
        if rest is not None:
            current, count = rest, max(count - 1, 2)
        elif count == len(current):
            break
        else:
            count = min(len(current), 2 * count)
    return current


def every_minimal(parts: Sequence[Part], fails: Fails[Part]) -> list[tuple[Part, ...]]:
    """Disjoint 1-minimal failing parts, until what is left does not fail: each culprit that fails for itself is one."""
    rest, found = tuple(parts), []
    while rest and fails(rest):
        found.append(minimal(rest, fails))
        rest = without(rest, found[-1])
    return found


def first_bad(count: int, is_bad: Callable[[int], bool]) -> int:
    """A k in 1…count with is_bad(k) and not is_bad(k − 1), by halving; the first such k if badness never ends.

    Takes for granted that 0 is good and `count` is bad.
    """
    good, bad = 0, count
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if is_bad(middle) else (middle, bad)
    return bad


def without(parts: Sequence[Part], gone: Sequence[Part]) -> tuple[Part, ...]:
    """`parts` that are not in `gone`, in order."""
    left_out = set(gone)
    return tuple(part for part in parts if part not in left_out)


def _chunks(parts: tuple[Part, ...], count: int) -> list[tuple[Part, ...]]:
    """`count` consecutive pieces of nearly equal size."""
    bounds = [len(parts) * i // count for i in range(count + 1)]
    return [parts[start:end] for start, end in itertools.pairwise(bounds)]
