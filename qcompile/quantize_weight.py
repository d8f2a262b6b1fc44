"""Quantize a weight some rows at a time, so that no float32 copy of all of it is made and the parts stay in a cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile.ops import blocks, quantize


def quantize_weight(
    weight: Tensor, factors: list[Tensor], mode: str, dtype: torch.dtype, scale_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """What ops.quantize makes of weight [..., N, K] in mode "row", bit for bit: q [..., N, K], scale [..., N]."""
    assert mode == "row", "every row of a weight has a scale of its own"
    q = torch.empty_like(weight, dtype=dtype)
    scale = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
    for place, rows, pieces in parts(weight, factors):
        q[place], scale[place] = quantize(rows, pieces, mode, dtype, scale_dtype)
    return q, scale


def parts(weight: Tensor, factors: list[Tensor]) -> Iterator[tuple[tuple[int | slice, ...], Tensor, list[Tensor]]]:
    """Rows of a weight [..., N, K], where they are, and what belongs to them of the factors [K] or [N, 1]."""
    if weight.ndim > 2:
        for number, matrix in enumerate(weight):
            yield from (((number, *place), rows, pieces) for place, rows, pieces in parts(matrix, factors))
        return
    start = 0
    for rows in blocks(weight):
        part = slice(start, start := start + len(rows))
        yield (part,), rows, [factor[part] if factor.ndim == 2 else factor for factor in factors]
