"""scaled_grouped_mm, int8 on x86: each expert's rows by the kernels that linears have.

How many rows an expert gets only the call knows, so one operator walks through them. Our own kernel writes finished
results. Where there is AMX, oneDNN sums many rows twice as fast; then the operator ends with the sums, and Inductor
fuses the epilogue into what reads them. A weight's row sums are computed once (lowering/unsigned.py).
"""

import torch
from torch import Tensor

from qcompile import products
from qcompile.grouped_ops import groups, of_rows
from qcompile.lowering import cpu_library, scaled_mm_int8_cpu, scaled_mm_vnni, unsigned
from qcompile.lowering.cpu_library import DTYPES, LIBRARY
from qcompile.lowering.target import Target
from qcompile.rewrite import hint

LIBRARY.define(  # type: ignore[no-untyped-call]
    "scaled_grouped_mm(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor compensation,"
    " Tensor offsets, ScalarType out_dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(  # type: ignore[no-untyped-call]
    "grouped_int_mm(Tensor x, Tensor weight, Tensor offsets) -> (Tensor, Tensor)",
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
) -> Tensor:
    """x [S, K] uint8, weight [E, N, K] int8 → [S, N], by our own kernel."""
    y = x.new_zeros((x.shape[0], weight.shape[1]), dtype=out_dtype)
    for expert, rows in groups(offsets, x.shape[0]):
        y[rows] = torch.ops.qcompile_cpu.scaled_mm.default(
            x[rows], weight[expert], of_rows(x_scale, rows).reshape(-1), weight_scale[expert], compensation[expert],
            None, None, out_dtype,
        )  # fmt: skip
    return y


def _grouped_int_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """x [S, K] uint8, weight [E, N, K] int8 → their sums [S, N] int32 by oneDNN, and each row's expert [S] int64."""
    sums = x.new_empty((x.shape[0], weight.shape[1]), dtype=torch.int32)
    experts = x.new_zeros(x.shape[0], dtype=torch.int64)
    end = 0
    for expert, rows in groups(offsets, x.shape[0]):
        torch._int_mm(x[rows], weight[expert].t(), out=sums[rows])
        experts[rows], end = expert, rows.stop
    sums[end:] = 0
    return sums, experts


LIBRARY.impl("scaled_grouped_mm", _scaled_grouped_mm, "CPU")  # type: ignore[no-untyped-call]
LIBRARY.impl("grouped_int_mm", _grouped_int_mm, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake(
    "qcompile_cpu::scaled_grouped_mm",
    lambda x, weight, x_scale, weight_scale, compensation, offsets, out_dtype: x.new_empty(
        (x.shape[0], weight.shape[1]), dtype=out_dtype
    ),
    lib=LIBRARY,
)
torch.library.register_fake(
    "qcompile_cpu::grouped_int_mm",
    lambda x, weight, offsets: (
        x.new_empty((x.shape[0], weight.shape[1]), dtype=torch.int32),
        x.new_empty(x.shape[0], dtype=torch.int64),
    ),
    lib=LIBRARY,
)


def runs_on(target: Target) -> str:
    """Why neither kernel can run on a target; empty if one can."""
    return cpu_library.runs_on(target) and scaled_mm_int8_cpu.runs_on(target)


def takes(target: Target, x: Tensor, weight: Tensor) -> str:
    """Why these kernels cannot take these arguments, weight [N, K] of one expert; empty if they can."""
    own = not cpu_library.runs_on(target)
    return unsigned.takes(target, x, weight) if own else scaled_mm_int8_cpu.takes(target, x, weight)


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
    rows, weight, compensation = unsigned.shifted(x).contiguous(), weight.contiguous(), unsigned.compensation(weight)
    if sums_first(target, x, weight):
        sums, experts = torch.ops.qcompile_cpu.grouped_int_mm.default(rows, weight, offsets)
        sums = sums - compensation[experts]
        return products.epilogue(sums, x_scale, weight_scale[experts], None, None, None, out_dtype)
    dtype = out_dtype if out_dtype in DTYPES else torch.float32
    y: Tensor = torch.ops.qcompile_cpu.scaled_grouped_mm.default(
        rows, weight, x_scale.contiguous(), weight_scale.contiguous(), compensation, offsets, dtype
    )
    return y.to(out_dtype)


def sums_first(target: Target, x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is the only kernel, or, with AMX, the faster one: for more rows than a few to an expert."""
    if cpu_library.runs_on(target):
        return True
    many = hint(x.shape[0]) > scaled_mm_vnni.FEW * hint(weight.shape[0])
    return many and scaled_mm_int8_cpu.uses_amx(target, x, weight[0])
