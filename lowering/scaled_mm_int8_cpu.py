"""scaled_mm, int8 on x86 through torch._int_mm, that is oneDNN, which uses VNNI or AMX.

oneDNN falls back to a reference loop for signed activations without AMX (thousands of times slower), hence
lowering/unsigned.py. The sums go to memory as int32; Inductor fuses the epilogue into what reads them.
"""

import functools

import torch
from torch import Tensor

from qcompile.lowering import unsigned
from qcompile.lowering.cpu_library import LIBRARY
from qcompile.lowering.target import Target
from qcompile.products import scaled_mm_of

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


def uses_amx(target: Target, x: Tensor, weight: Tensor) -> bool:
    """Whether it can multiply these with AMX, several times faster than any kernel without."""
    return "amx_int8" in target.features and not (runs_on(target) or takes(target, x, weight))


def takes(target: Target, x: Tensor, weight: Tensor) -> str:
    """Why this kernel cannot take these arguments; empty if it can."""
    if weight.shape[1] == 1:
        return "needs K of at least 2: torch._int_mm mistakes the layout of a single column"
    return unsigned.takes(target, x, weight)


def accumulate(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] int8, weight [N, K] int8 → sums [M, N] int32."""
    sums: Tensor = torch.ops.qcompile_cpu.int_mm.default(unsigned.shifted(x), weight)
    return sums - unsigned.compensation(weight)


scaled_mm = scaled_mm_of(accumulate)
