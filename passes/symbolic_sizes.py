"""Reshapes at sizes that are not known: where must labels not differ, so that they mean the same at every size?

The gauge analysis sees a symbolic size at its example value. Along a dimension of size c·s, with c the constant factor
and s symbolic, it keeps labels that repeat every c elements: merging [s, c] into one dimension, and taking it apart
again, then gives the same labels for every s. Batch and heads, merged for a bmm, are such a dimension.
"""

from collections.abc import Sequence

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

Size = int | torch.SymInt


def constant_factor(size: torch.SymInt) -> int:
    """The integer that a symbolic size is a multiple of: 8 for 8·s, 1 for s and for s + 8."""
    factor, _ = size.node.expr.as_coeff_Mul()
    return int(factor) if factor.is_Integer and factor > 0 else 1


def must_agree(before: Sequence[Size], after: Sequence[Size]) -> tuple[list[int], list[int]]:
    """Dimensions of a reshape's input, and of its result, along which labels must be the same.

    These are the dimensions in front of the last symbolic one, leaving out those that the reshape does not touch.
    Without them the labels are a sequence with a period p, and the result asks for a period q. Both lengths fit into
    the sequence a whole number of times, which is enough to see every consequence: l(i) = l(i + q) for all i mod p.
    """
    start, stop = _untouched(before, after)
    inner, outer = before[start : len(before) - stop], after[start : len(after) - stop]
    if not any(isinstance(size, torch.SymInt) for size in (*inner, *outer)):
        return [], []
    return [start + dim for dim in range(_front(inner))], [start + dim for dim in range(_front(outer))]


def _untouched(before: Sequence[Size], after: Sequence[Size]) -> tuple[int, int]:
    """How many leading and how many trailing sizes a reshape leaves as they are."""
    shorter = min(len(before), len(after))
    start = 0
    while start < shorter and statically_known_true(before[start] == after[start]):
        start += 1
    stop = 0
    while stop < shorter - start and statically_known_true(before[-1 - stop] == after[-1 - stop]):
        stop += 1
    return start, stop


def _front(sizes: Sequence[Size]) -> int:
    """How many dimensions stand in front of the last symbolic one; all of them, if there is none."""
    return max((dim for dim, size in enumerate(sizes) if isinstance(size, torch.SymInt)), default=len(sizes))
