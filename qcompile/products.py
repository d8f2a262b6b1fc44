"""What a quantized product computes: sums, and what becomes of them. Plain functions; `ops` makes operators of them.

Notation (docs/notation.md): M tokens, K input channels, N output channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def accumulate(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] · weightᵀ [K, N]: int32 and exact for int8, float32 for fp8.

    float64 holds every int8 sum exactly (127² · K < 2^53) and, unlike integers, has a fast product everywhere.
    """
    if x.dtype == torch.int8:
        return torch.mm(x.to(torch.float64), weight.to(torch.float64).t()).to(torch.int32)
    return torch.mm(x.to(torch.float32), weight.to(torch.float32).t())


def epilogue(
    sums: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Scales, bias, activation and residual on accumulated sums [M, N], in float32, in this order."""
    y = sums.to(torch.float32) * (x_scale.reshape(-1, 1) * weight_scale)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return finish(y, residual, activation, out_dtype)


def finish(y: Tensor, residual: Tensor | None, activation: str | None, out_dtype: torch.dtype) -> Tensor:
    """The epilogue's last steps: y [M, N] float32, scaled and biased, and residual [..., N] → [M, N] of out_dtype."""
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    if residual is not None:
        y = y + residual.reshape(y.shape).to(torch.float32)
    return y.to(out_dtype)


def scaled_mm_of(accumulate: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The operator scaled_mm around one way to sum: accumulate takes x [M, K] and weight [N, K] and returns the sums
    [M, N] of their products, int32 or float32, before any scale."""

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
        sums = accumulate(x.reshape(-1, x.shape[-1]), weight)
        y = epilogue(sums, x_scale, weight_scale, bias, residual, activation, out_dtype)
        return y.reshape(*x.shape[:-1], weight.shape[0])

    return scaled_mm


def sums_of(accumulate: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The operator accumulate around one way to sum, which takes x [M, K] as in `scaled_mm_of`."""

    def sums(x: Tensor, weight: Tensor) -> Tensor:
        """x [..., K], weight [N, K] → [..., N]; see qcompile.ops.accumulate."""
        return accumulate(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[0])

    return sums


def from_sums(
    sums: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """As `epilogue`, of sums [..., N]; see qcompile.ops.from_sums."""
    rows = sums.reshape(-1, sums.shape[-1])
    return epilogue(rows, x_scale, weight_scale, bias, residual, activation, out_dtype).reshape(sums.shape)
