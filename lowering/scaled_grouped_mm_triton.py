"""scaled_grouped_mm on NVIDIA GPUs: a Triton kernel that finds each tile's expert for itself.

The kernel is in `scaled_grouped_mm_kernel`, which is imported when a product is lowered to it. Tiles are those of a
product with as many rows as an expert gets on average.
"""

import torch
from torch import Tensor

from qcompile.lowering import scaled_mm_triton
from qcompile.lowering.scaled_mm_triton import tiles_for
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import Table

runs_on, takes = scaled_mm_triton.runs_on, scaled_mm_triton.takes


def scaled_grouped_mm(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype,
    *,
    target: Target,
    measured: Table | None = None,
) -> Tensor:
    """x [S, K], weight [E, N, K], both int8 or both fp8 → [S, N]; see qcompile.grouped_ops.scaled_grouped_mm."""
    from qcompile.lowering import scaled_grouped_mm_kernel  # noqa: F401  (defines the operator)

    tiles = tiles_for(mean_rows(x, weight), weight, target, measured)
    y: Tensor = torch.ops.qcompile_triton.scaled_grouped_mm.default(
        x, weight, x_scale, weight_scale, offsets, out_dtype, tiles
    )
    return y


def mean_rows(x: Tensor, weight: Tensor) -> int | torch.SymInt:
    """How many rows of x [S, K] an expert of weight [E, N, K] gets, at least 1; of an S that only the call knows, which
    divides it then, S itself."""
    return max(1, x.shape[0] // weight.shape[0]) if isinstance(x.shape[0], int) else x.shape[0]
