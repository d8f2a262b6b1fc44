"""An experiment: RMSNorm, quantize and product in one kernel, for decode.

Beside the backend's two kernels, norm + quantize and the product, it saves one launch and one trip through memory of x,
and pays with every program normalizing the same few rows. `scripts/gpu.py` measures both. It moves to lowering/ if it
wins, and goes if it does not.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_TOKENS = 16
TO_INTEGER = tl.constexpr(1.5 * 2**23)  # added and taken away again, it rounds a small float32, ties to even


@triton.jit
def norm_scaled_mm_kernel(
    x, gain, weight, weight_scale, out, M, N, K, epsilon,
    IS_INT8: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """x [M ≤ 16, K], gain [K], weight [N, K] → out [M, N]; all contiguous. A program computes BLOCK_N columns."""
    rows, inner = tl.arange(0, 16), tl.arange(0, BLOCK_K)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    xs = x + rows[:, None] * K + inner[None, :]
    weights = weight + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * K + inner[None, :]
    squares, peak = tl.zeros((16,), tl.float32), tl.zeros((16,), tl.float32)
    for start in range(0, K, BLOCK_K):
        values, gains = _values(xs, gain, start, rows, inner, M, K)
        squares += tl.sum(values * values, 1)
        peak = tl.maximum(peak, tl.max(tl.abs(values * gains), 1))
    inverse = tl.rsqrt(squares / K + epsilon)
    scale = peak * inverse / LARGEST
    factor = inverse / tl.where(scale > 0, scale, 1.0)
    sums = tl.zeros((BLOCK_N, 16), dtype=tl.int32 if IS_INT8 else tl.float32)
    for start in range(0, K, BLOCK_K):
        values, gains = _values(xs, gain, start, rows, inner, M, K)
        quantized = values * gains * factor[:, None]
        if IS_INT8:
            quantized = (quantized + TO_INTEGER) - TO_INTEGER
        quantized = quantized.to(weight.dtype.element_ty)
        block = tl.load(weights + start, mask=(inner < K - start)[None, :], other=0.0)
        sums = tl.dot(block, tl.trans(quantized), sums, out_dtype=sums.dtype)
    scales = tl.load(weight_scale + columns, mask=columns < N, other=0.0)
    y = tl.trans(sums.to(tl.float32) * scales[:, None]) * scale[:, None]
    at = rows[:, None] * N + columns[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def _values(xs, gain, start, rows, inner, M, K):
    """A block of x [16, BLOCK_K] and of the gain [1, BLOCK_K], in float32; zeros outside."""
    valid = (inner < K - start)[None, :]
    values = tl.load(xs + start, mask=valid & (rows < M)[:, None], other=0.0).to(tl.float32)
    return values, tl.load(gain + start + inner[None, :], mask=valid, other=0.0).to(tl.float32)


def norm_scaled_mm(
    x: Tensor, gain: Tensor, weight: Tensor, weight_scale: Tensor, *, epsilon: float, block_n: int = 64
) -> Tensor:
    """scaled_mm(quantize(rms_norm(x, gain)), weight) for up to 16 tokens: x [M, K], weight [N, K] int8 or fp8 → [M, N].

    The norm is not rounded to x's dtype before it is quantized. block_n: below 64, fp8 is multiplied as float16.
    """
    (m, k), n = x.shape, weight.shape[0]
    if not 0 < m <= MOST_TOKENS or not all(t.is_contiguous() for t in (x, gain, weight, weight_scale)):
        raise ValueError(f"needs contiguous tensors and 1 to {MOST_TOKENS} tokens; got x {tuple(x.shape)} {x.stride()}")
    out = x.new_empty((m, n))
    is_int8 = weight.dtype == torch.int8
    norm_scaled_mm_kernel[(triton.cdiv(n, block_n),)](
        x, gain, weight, weight_scale, out, m, n, k, epsilon,
        IS_INT8=is_int8, BLOCK_N=block_n, BLOCK_K=256, LARGEST=127.0 if is_int8 else torch.finfo(weight.dtype).max,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return out
