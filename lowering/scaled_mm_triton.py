"""scaled_mm on NVIDIA GPUs: one Triton kernel with scales, bias, activation and residual in its epilogue.

The kernel is in `scaled_mm_kernel`, which is imported when a product is lowered to it, so that everything else works
without Triton. Its operator, `qcompile_triton::scaled_mm`, takes the tile as an argument: the choice is in the graph.
"""

import functools
import importlib

import torch
from torch import Tensor

from qcompile.lowering.devices import device_of, without_fp8, without_triton
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import Table, by_bucket, choose_tile
from qcompile.rewrite import hint

# 128² · K must stay within int32. Weights that others quantized may hold −128.
LARGEST_K = (2**31 - 1) // 128**2


def runs_on(target: Target) -> str:
    """Why this kernel cannot run on a target; empty if it can."""
    return without_triton(target) or not_installed()


def takes(target: Target, x: Tensor, weight: Tensor) -> str:
    """Why this kernel cannot take these arguments; empty if it can."""
    if x.dtype != weight.dtype:
        return f"needs operands of one dtype, got {x.dtype} and {weight.dtype}"
    if x.dtype != torch.int8 and (reason := without_fp8(target)):
        return reason
    if weight.shape[1] < 1 or weight.shape[0] < 1:
        return f"needs a weight with elements, got {tuple(weight.shape)}"
    if x.dtype == torch.int8 and weight.shape[1] > LARGEST_K:
        return f"needs K ≤ {LARGEST_K} to stay within int32, got {weight.shape[1]}"
    return ""


@functools.cache
def not_installed() -> str:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"needs Triton, which cannot be imported: {error}"
    return ""


def scaled_mm(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    *,
    target: Target,
    measured: Table | None = None,
) -> Tensor:
    """x [..., K], weight [N, K], both int8 or both fp8 → [..., N]; see qcompile.ops.scaled_mm."""
    from qcompile.lowering import scaled_mm_kernel  # noqa: F401  (defines the operator)

    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = torch.ops.qcompile_triton.scaled_mm.default(
        rows,
        weight,
        x_scale.reshape(-1) if x_scale.ndim else x_scale,
        weight_scale,
        bias,
        None if residual is None else residual.reshape(-1, weight.shape[0]),
        activation or "",
        out_dtype,
        tiles_for(rows.shape[0], weight, target, measured),
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])


def tiles_for(tokens: int | torch.SymInt, weight: Tensor, target: Target, measured: Table | None) -> list[int]:
    """For weight [..., N, K]: one tile if the number of tokens is known, else one for every bucket, for the call to
    pick from."""
    device = device_of(target)
    assert device is not None
    n, k = (hint(size) for size in weight.shape[-2:])
    dtype = "int8" if weight.dtype == torch.int8 else "fp8"
    if isinstance(tokens, int):
        return [0, *choose_tile(tokens, n, k, dtype, device, measured, target.name).to_ints()]
    return by_bucket(n, k, dtype, device, measured, target.name)
