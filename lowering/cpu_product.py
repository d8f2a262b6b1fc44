"""What our own int8 products on x86 have in common: which operands they take, and scaled_mm around them."""

from collections.abc import Callable

import torch
from torch import Tensor

from qcompile import products
from qcompile.lowering.cpu_library import DTYPES


def takes_int8(x: Tensor, weight: Tensor, longest: int) -> str:
    """Why sums over int8 operands of at most `longest` channels cannot be had of these; empty if they can."""
    if x.dtype != torch.int8:
        return f"needs int8, got {x.dtype}"
    if weight.shape[1] > longest:
        return f"needs K ≤ {longest} to stay within int32, got {weight.shape[1]}"
    return ""


def scaled_mm_by(multiply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator scaled_mm around a kernel that applies scales, bias and residual itself.

    multiply: takes x [M, K], weight [N, K], x_scale [M] or [1], weight_scale [N], bias [N] float32 or None, residual
    [M, N] of out_dtype or None, all contiguous, and out_dtype, one of cpu_library.DTYPES; returns [M, N].
    An activation, and dtypes that kernels do not write, are left to Inductor.
    """

    def scaled_mm(
        x: Tensor,
        weight: Tensor,
        x_scale: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """x [..., K], weight [N, K] → [..., N]; see qcompile.ops.scaled_mm."""
        whole = activation is None and out_dtype in DTYPES and (residual is None or residual.dtype == out_dtype)
        y = multiply(
            x.reshape(-1, x.shape[-1]).contiguous(),
            weight.contiguous(),
            x_scale.reshape(-1).contiguous(),
            weight_scale.contiguous(),
            None if bias is None else bias.to(torch.float32).contiguous(),
            residual.reshape(-1, weight.shape[0]).contiguous() if whole and residual is not None else None,
            out_dtype if whole else torch.float32,
        )
        y = y if whole else products.finish(y, residual, activation, out_dtype)
        return y.reshape(*x.shape[:-1], weight.shape[0])

    return scaled_mm
