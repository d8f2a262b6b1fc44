"""scaled_grouped_mm, int8 on x86: each expert's rows by the kernels that linears have.

How many rows an expert gets only the call knows, so one operator walks through them, and nothing fuses into it. A weight's
row sums are computed once (lowering/unsigned.py).
"""

import torch
from torch import Tensor

from qcompile import products
from qcompile.grouped_ops import groups, of_rows
from qcompile.lowering import cpu_library, scaled_mm_int8_cpu, scaled_mm_vnni, unsigned
from qcompile.lowering.cpu_library import DTYPES, LIBRARY
from qcompile.lowering.target import Target

AWARE = True  # of the target
EVERY = 2**62

LIBRARY.define(  # type: ignore[no-untyped-call]
    "scaled_grouped_mm(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor compensation,"
    " Tensor offsets, ScalarType out_dtype, int few) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _scaled_grouped_mm(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    compensation: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype,
    few: int,
) -> Tensor:
    """x [S, K] uint8, weight [E, N, K] int8 → [S, N]. Experts with at most `few` rows get our own kernel, others oneDNN."""
    y = x.new_zeros((x.shape[0], weight.shape[1]), dtype=out_dtype)
    for expert, rows in groups(offsets, x.shape[0]):
        part, matrix, scale = x[rows], weight[expert], of_rows(x_scale, rows).reshape(-1)
        if len(part) <= few:
            y[rows] = torch.ops.qcompile_cpu.scaled_mm.default(
                part, matrix, scale, weight_scale[expert], compensation[expert], None, None, out_dtype
            )
        else:
            sums = torch.ops.qcompile_cpu.int_mm.default(part, matrix) - compensation[expert]
            y[rows] = products.epilogue(sums, scale, weight_scale[expert], None, None, None, out_dtype)
    return y


LIBRARY.impl("scaled_grouped_mm", _scaled_grouped_mm, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake(
    "qcompile_cpu::scaled_grouped_mm",
    lambda x, weight, x_scale, weight_scale, compensation, offsets, out_dtype, few: x.new_empty(
        (x.shape[0], weight.shape[1]), dtype=out_dtype
    ),
    lib=LIBRARY,
)


def runs_on(target: Target) -> str:
    """Why neither kernel can run on a target; empty if one can."""
    return cpu_library.runs_on(target) and scaled_mm_int8_cpu.runs_on(target)


def takes(target: Target, x: Tensor, weight: Tensor) -> str:
    """Why these kernels cannot take these arguments, weight [N, K] of one expert; empty if they can."""
    if cpu_library.runs_on(target) or "amx_int8" in target.features:
        return scaled_mm_int8_cpu.takes(target, x, weight)
    return unsigned.takes(target, x, weight)


def scaled_grouped_mm(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype,
    *,
    target: Target,
    measured: object = None,
) -> Tensor:
    """x [S, K], weight [E, N, K], both int8 → [S, N]; see qcompile.grouped_ops.scaled_grouped_mm."""
    y: Tensor = torch.ops.qcompile_cpu.scaled_grouped_mm.default(
        unsigned.shifted(x).contiguous(),
        weight.contiguous(),
        x_scale.contiguous(),
        weight_scale.contiguous(),
        unsigned.compensation(weight),
        offsets,
        out_dtype if out_dtype in DTYPES else torch.float32,
        _few(target),
    )
    return y.to(out_dtype)


def _few(target: Target) -> int:
    """Up to how many rows our own kernel is the better one, or the only one."""
    if cpu_library.runs_on(target):
        return 0
    return scaled_mm_vnni.FEW if "amx_int8" in target.features else EVERY
