"""Reshapes at sizes that are not known: where must labels not differ, so that they mean the same at every size?

The gauge analysis sees a symbolic size at its example value. Along a dimension of size c·s, with c the constant factor
and s symbolic, it keeps labels that repeat every c elements: merging [s, c] into one dimension, and taking it apart
again, then gives the same labels for every s. Batch and heads, merged for a bmm, are such a dimension.
"""

import math
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

    Labels that repeat along the last symbolic size, and are the same along all dimensions in front of it, are a
    sequence with a period. Two shapes agree on every size if one's period divides the other's.
    """
    start, stop = _kept(before, after)
    inner, outer = before[start : len(before) - stop], after[start : len(after) - stop]
    if not any(isinstance(size, torch.SymInt) for size in (*inner, *outer)):
        return [], []
    (front_in, period_in), (front_out, period_out) = _sequence(inner), _sequence(outer)
    if period_in % period_out and period_out % period_in:
        front_in, front_out = len(inner), len(outer)
    return [start + dim for dim in range(front_in)], [start + dim for dim in range(front_out)]


def _kept(before: Sequence[Size], after: Sequence[Size]) -> tuple[int, int]:
    """How many leading and how many trailing sizes a reshape leaves as they are."""
    shorter = min(len(before), len(after))
    start = 0
    while start < shorter and statically_known_true(before[start] == after[start]):
        start += 1
    stop = 0
    while stop < shorter - start and statically_known_true(before[-1 - stop] == after[-1 - stop]):
        stop += 1
    return start, stop


def _sequence(sizes: Sequence[Size]) -> tuple[int, int]:
    """How many dimensions stand in front of the last symbolic one, and the period from there on."""
    symbolic = [dim for dim, size in enumerate(sizes) if isinstance(size, torch.SymInt)]
    if not symbolic:
        return len(sizes), 1
    last = symbolic[-1]
    size = sizes[last]
    assert isinstance(size, torch.SymInt)
    return last, constant_factor(size) * math.prod(int(fixed) for fixed in sizes[last + 1 :])
