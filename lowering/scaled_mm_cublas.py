"""fp8 products by cuBLAS, through `torch._scaled_mm`, where a measured table says that it is faster than our kernels.

Its kernels for Hopper load for two or four multiprocessors at once. It has an epilogue of scales and bias and nothing
else: an activation or residual behind it would round twice, so those products stay ours.
"""

import torch
from torch import Tensor


def takes(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> str:
    """Why cuBLAS cannot compute x [M, K] · weight [N, K]ᵀ as `ops.scaled_mm` has it; empty if it can."""
    dtypes = x.dtype, weight.dtype, out_dtype
    if dtypes != (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.bfloat16):
        return f"needs e4m3 operands and bfloat16 results, got {', '.join(map(str, dtypes))}"
    if residual is not None or activation:
        return "has no activation and adds no residual"
    if x_scale.ndim == 0:
        return "needs a scale per token"
    if bias is not None and bias.dtype != torch.bfloat16:
        return f"needs a bias of bfloat16, got {bias.dtype}"
    if any(size == 0 or size % 16 for size in weight.shape):
        return f"needs N and K to be multiples of 16, got {tuple(weight.shape)}"
    if not (_is_whole(x) and _is_whole(weight)):
        return f"needs rows one behind the other, from a multiple of 16 on, got strides {x.stride()}, {weight.stride()}"
    return ""


def _is_whole(operand: Tensor) -> bool:
    """Whether an 8-bit matrix lies in memory as cuBLAS is told, a single row too."""
    return operand.stride() == (operand.shape[1], 1) and operand.storage_offset() % 16 == 0


@torch.library.custom_op("qcompile_cublas::scaled_mm", mutates_args=(), device_types="cuda")
def scaled_mm_op(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K], weight [N, K] of e4m3, x_scale [M], weight_scale [N] of float32 → [M, N] of bfloat16.

    Sums as the hardware keeps them (`use_fast_accum`), as ours are. An operator of its own: Inductor would weigh
    templates of its own against `aten._scaled_mm`.
    """
    scales = x_scale.contiguous().unsqueeze(1), weight_scale.contiguous().unsqueeze(0)
    return torch._scaled_mm(x, weight.t(), *scales, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True)


@scaled_mm_op.register_fake
def _fake(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.bfloat16)
