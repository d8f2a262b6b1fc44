"""scaled_grouped_mm on NVIDIA GPUs: a Triton kernel that finds each tile's expert for itself.

The kernel is in `scaled_grouped_mm_kernel`, which is imported when a product is lowered to it. Tiles are those of a
product with as many rows as an expert gets on average.
"""

import torch
from torch import Tensor

from qcompile.lowering import scaled_mm_triton
from qcompile.lowering.devices import device_of
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import Table, by_bucket, choose_tile
from qcompile.rewrite import hint

AWARE = True  # of the target and its tiles
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

    tiles = _tiles(x, weight, target, measured)
    y: Tensor = torch.ops.qcompile_triton.scaled_grouped_mm.default(
        x, weight, x_scale, weight_scale, offsets, out_dtype, tiles
    )
    return y


def _tiles(x: Tensor, weight: Tensor, target: Target, measured: Table | None) -> list[int]:
    """As of `scaled_mm_triton`, by the mean number of an expert's rows."""
    device = device_of(target)
    assert device is not None
    experts, n, k = (hint(size) for size in weight.shape)
    dtype = "int8" if x.dtype == torch.int8 else "fp8"
    if isinstance(x.shape[0], int):
        rows = max(1, x.shape[0] // experts)
        return [0, *choose_tile(rows, n, k, dtype, device, measured, target.name).to_ints()]
    return by_bucket(n, k, dtype, device, measured, target.name)
