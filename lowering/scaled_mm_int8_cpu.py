"""scaled_mm, int8 on x86: unsigned activations times signed weights.

VNNI multiplies u8 by s8, and oneDNN falls back to a reference loop for s8 activations without AMX (thousands of times
slower). So the activation is shifted by 128 into u8, and 128 times the weight's row sums comes off the product:

    Σ_k (x_k + 128)·w_k − 128·Σ_k w_k = Σ_k x_k·w_k,        exact in int32

The row sums depend on the weight alone and are computed once. Inductor fuses the shift into whatever quantizes x, and
the subtraction into the epilogue.
"""

import functools

import torch
from torch import Tensor

from qcompile.lowering.target import Target
from qcompile.ops import scaled_mm_of

SHIFT = 128
# Beyond it the unsigned sum could leave int32. Weights that others quantized may hold −128.
LARGEST_K = (2**31 - 1) // (255 * 128)
LIBRARY = torch.library.Library("qcompile_cpu", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(  # type: ignore[no-untyped-call]
    "int_mm(Tensor x, Tensor weight) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def _int_mm(x: Tensor, weight: Tensor) -> Tensor:
    return torch._int_mm(x, weight.t())


def _int_mm_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.int32)


LIBRARY.impl("int_mm", _int_mm, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("qcompile_cpu::int_mm", _int_mm_fake, lib=LIBRARY)


def runs_on(target: Target) -> str:
    """Why this kernel cannot run on a target; empty if it can."""
    if target.kind != "cpu":
        return f"needs a CPU, the target is {target}"
    if not target.features & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        return "needs VNNI or AMX; without them u8×s8 products saturate"
    if not _multiplies_unsigned():
        return f"needs torch._int_mm to take uint8 on a CPU, which it does not in torch {torch.__version__}"
    return ""


@functools.cache
def _multiplies_unsigned() -> bool:
    with torch.utils._python_dispatch._disable_current_modes():  # asked while a graph is traced, as a rule
        ones = torch.ones(4, 4, dtype=torch.uint8, device="cpu")
        try:
            torch._int_mm(ones, ones.to(torch.int8))
        except RuntimeError:
            return False
    return True


def takes(target: Target, x: Tensor, weight: Tensor) -> str:
    """Why this kernel cannot take these arguments; empty if it can."""
    if x.dtype != torch.int8:
        return f"needs int8, got {x.dtype}"
    if weight.shape[1] == 1:
        return "needs K of at least 2: torch._int_mm mistakes the layout of a single column"
    if weight.shape[1] > LARGEST_K:
        return f"needs K ≤ {LARGEST_K} to stay within int32, got {weight.shape[1]}"
    return ""


def accumulate(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] int8, weight [N, K] int8 → sums [M, N] int32."""
    unsigned = (x.to(torch.int16) + SHIFT).to(torch.uint8)
    shift = SHIFT * weight.sum(1, dtype=torch.int32)
    sums: Tensor = torch.ops.qcompile_cpu.int_mm.default(unsigned, weight)
    return sums - shift


scaled_mm = scaled_mm_of(accumulate)
