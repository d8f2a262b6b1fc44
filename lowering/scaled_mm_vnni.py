"""scaled_mm, int8 on x86 with AVX512-VNNI: our own kernel, epilogue included (x86/scaled_mm_vnni.cpp).

It reads weights where they lie and writes the finished result, for any number of tokens. docs/cpu.md compares it with
oneDNN.
"""

import torch
from torch import Tensor

from qcompile import products
from qcompile.lowering import scaled_mm_int8_cpu, unsigned
from qcompile.lowering.cpu_library import DTYPES, LIBRARY, SCALED_MM_VNNI, TAGS
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
    """x [..., K], weight [N, K] → [..., N]; see qcompile.ops.scaled_mm.

    The kernel adds bias and residual. An activation, and dtypes that it does not write, are left to Inductor.
    """
    rows = unsigned.shifted(x.reshape(-1, x.shape[-1])).contiguous()
    shape = (*x.shape[:-1], weight.shape[0])
    whole = activation is None and out_dtype in DTYPES and (residual is None or residual.dtype == out_dtype)
    y: Tensor = torch.ops.qcompile_cpu.scaled_mm.default(
        rows,
        weight.contiguous(),
        x_scale.reshape(-1).contiguous(),
        weight_scale.contiguous(),
        unsigned.compensation(weight),
        None if bias is None else bias.to(torch.float32).contiguous(),
        residual.reshape(-1, weight.shape[0]).contiguous() if whole and residual is not None else None,
        out_dtype if whole else torch.float32,
    )
    y = y if whole else products.finish(y, residual, activation, out_dtype)
    return y.reshape(shape)
