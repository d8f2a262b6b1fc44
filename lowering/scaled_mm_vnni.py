"""scaled_mm, int8 on x86 with AVX512-VNNI: our own kernel, epilogue included (x86/scaled_mm_vnni.cpp).

It reads weights where they lie and writes the finished result, for any number of tokens. docs/cpu.md compares it with
oneDNN.
"""

from typing import Any

import torch
from torch import Tensor

from qcompile.lowering import scaled_mm_int8_cpu, unsigned
from qcompile.lowering.cpu_library import LIBRARY, SCALED_MM_VNNI, TAGS
from qcompile.lowering.cpu_product import scaled_mm_by
from qcompile.lowering.target import Target

runs_on = SCALED_MM_VNNI.runs_on
# More tokens than this are oneDNN's where there is AMX, which multiplies several times faster and which this kernel
# does not use. Up to here weights arrive from memory no faster.
FEW = 16

LIBRARY.define(  # type: ignore[no-untyped-call]
    "scaled_mm(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor compensation, Tensor? bias,"
    " Tensor? residual, ScalarType out_dtype) -> Tensor",
    tags=TAGS,
)
torch.library.register_fake(
    "qcompile_cpu::scaled_mm",
    lambda x, weight, x_scale, weight_scale, compensation, bias, residual, out_dtype: x.new_empty(
        (x.shape[0], weight.shape[0]), dtype=out_dtype
    ),
    lib=LIBRARY,
)


def takes(target: Target, x: Tensor, weight: Tensor) -> str:
    """Why this kernel cannot take these arguments; empty if it can."""
    if reason := unsigned.takes(target, x, weight):
        return reason
    tokens = x.numel() // max(1, weight.shape[1])
    if not (isinstance(tokens, int) and tokens <= FEW) and scaled_mm_int8_cpu.uses_amx(target, x, weight):
        return f"is for at most {FEW} tokens where oneDNN has AMX"
    return ""


def _multiply(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, *rest: Any) -> Tensor:
    shifted = unsigned.shifted(x).contiguous()
    y: Tensor = torch.ops.qcompile_cpu.scaled_mm.default(
        shifted, weight, x_scale, weight_scale, unsigned.compensation(weight), *rest
    )
    return y


scaled_mm = scaled_mm_by(_multiply)
