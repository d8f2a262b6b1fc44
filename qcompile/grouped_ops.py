"""The dialect's operators on stacks of matrices: experts, of which each multiplies the rows that were routed to it.

Notation as in `ops`, with E experts and S rows of all of them, sorted by expert. offsets [E] int32 or int64 says where
each expert's rows end: expert e has the rows offsets[e − 1]…offsets[e]. Rows after the last belong to nobody; what they
yield is not defined. It is the form of torch.nn.functional.grouped_mm with a 2-D left operand.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile import products
from qcompile.ops import REFERENCES, define


def groups(offsets: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and which. Waits for the device that offsets are on."""
    begin = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > begin:
            yield expert, slice(begin, min(end, rows))
            begin = end


def of_rows(x_scale: Tensor, rows: slice) -> Tensor:
    """The scales of some rows: of [S] theirs, a single one for all is what it is."""
    return x_scale[rows] if x_scale.ndim else x_scale


def _grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    y = x.new_zeros((x.shape[0], weight.shape[1]))
    for expert, rows in groups(offsets, x.shape[0]):
        y[rows] = torch.nn.functional.linear(x[rows], weight[expert])
    return y


def _scaled_grouped_mm(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    y = x.new_zeros((x.shape[0], weight.shape[1]), dtype=out_dtype)
    for expert, rows in groups(offsets, x.shape[0]):
        sums = products.accumulate(x[rows], weight[expert])
        scale = of_rows(x_scale, rows)
        y[rows] = products.epilogue(sums, scale, weight_scale[expert], None, None, None, out_dtype)
    return y


grouped_linear = define(
    "grouped_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor",
    _grouped_linear,
    lambda x, weight, offsets: x.new_empty((x.shape[0], weight.shape[1])),
)
"""x [S, K] and weight [E, N, K], one float dtype → x·weight[e]ᵀ [S, N] for the rows of each expert e."""

scaled_grouped_mm = define(
    "scaled_grouped_mm(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor offsets,"
    " ScalarType out_dtype) -> Tensor",
    _scaled_grouped_mm,
    lambda x, weight, x_scale, weight_scale, offsets, out_dtype: x.new_empty(
        (x.shape[0], weight.shape[1]), dtype=out_dtype
    ),
)
"""x [S, K] and weight [E, N, K], both int8 or fp8, → y [S, N] of out_dtype.

x_scale float32 is [S] (per-token) or [] (per-tensor), weight_scale [E, N] float32. For the rows of each expert e
y = x·weight[e]ᵀ · x_scale · weight_scale[e]; int8 sums are exact.
"""

REFERENCES |= {grouped_linear: _grouped_linear, scaled_grouped_mm: _scaled_grouped_mm}
