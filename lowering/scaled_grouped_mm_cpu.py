"""scaled_grouped_mm, int8 on x86: each expert's rows by the kernels that linears have.

How many rows an expert gets only the call knows, so one operator walks through them. Our own kernels write finished
results. Where there is AMX, oneDNN sums many rows twice as fast; then the operator ends with the sums, and Inductor
fuses the epilogue into what reads them. A weight's row sums, where activations are unsigned, are computed once
(lowering/unsigned.py).
"""

import torch
from torch import Tensor

from qcompile import products
from qcompile.grouped_ops import groups, of_rows
from qcompile.lowering import scaled_mm_avx, scaled_mm_int8_cpu, scaled_mm_vnni, unsigned
from qcompile.lowering.cpu_library import DTYPES, LIBRARY, SCALED_MM_VNNI, TAGS
from qcompile.lowering.target import Target
from qcompile.rewrite import hint

UNSIGNED = SCALED_MM_VNNI.operator  # takes uint8

LIBRARY.define(  # type: ignore[no-untyped-call]
    "scaled_grouped_mm(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? compensation,"
    " Tensor offsets, ScalarType out_dtype, str product) -> Tensor",
    tags=TAGS,
)
LIBRARY.define(  # type: ignore[no-untyped-call]
    "grouped_int_mm(Tensor x, Tensor weight, Tensor offsets) -> (Tensor, Tensor)",
    tags=TAGS,
)


def _scaled_grouped_mm(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    compensation: Tensor | None,
    offsets: Tensor,
    out_dtype: torch.dtype,
    product: str,
) -> Tensor:
    """x [S, K] uint8 with its compensation, or int8, weight [E, N, K] int8 → [S, N]. product: the operator that
    multiplies one expert's."""
    y = x.new_zeros((x.shape[0], weight.shape[1]), dtype=out_dtype)
    multiply = getattr(torch.ops.qcompile_cpu, product).default
    for expert, rows in groups(offsets, x.shape[0]):
        shift = () if compensation is None else (compensation[expert],)
        y[rows] = multiply(
            x[rows], weight[expert], of_rows(x_scale, rows).reshape(-1), weight_scale[expert], *shift,
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
    lambda x, weight, x_scale, weight_scale, compensation, offsets, out_dtype, product: x.new_empty(
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
    """Why no kernel can run on a target; empty if one can."""
    return "" if product_of(target) else scaled_mm_int8_cpu.runs_on(target)


def product_of(target: Target) -> str:
    """The operator of our own that multiplies one expert's rows; empty if oneDNN has to."""
    if not scaled_mm_vnni.runs_on(target):
        return UNSIGNED
    avx = scaled_mm_avx.widest(target) if scaled_mm_int8_cpu.runs_on(target) else None
    return avx.operator if avx else ""


def takes(target: Target, x: Tensor, weight: Tensor) -> str:
    """Why these kernels cannot take these arguments, weight [N, K] of one expert; empty if they can."""
    takers = {UNSIGNED: unsigned.takes, "": scaled_mm_int8_cpu.takes}
    return takers.get(product_of(target), scaled_mm_avx.takes)(target, x, weight)


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
    weight = weight.contiguous()
    if sums_first(target, x, weight):
        shift = unsigned.compensation(weight)
        sums, experts = torch.ops.qcompile_cpu.grouped_int_mm.default(unsigned.shifted(x).contiguous(), weight, offsets)
        return products.epilogue(sums - shift[experts], x_scale, weight_scale[experts], None, None, None, out_dtype)
    product = product_of(target)
    is_unsigned = product == UNSIGNED
    y: Tensor = torch.ops.qcompile_cpu.scaled_grouped_mm.default(
        (unsigned.shifted(x) if is_unsigned else x).contiguous(), weight, x_scale.contiguous(),
        weight_scale.contiguous(), unsigned.compensation(weight) if is_unsigned else None, offsets,
        out_dtype if out_dtype in DTYPES else torch.float32, product,
    )  # fmt: skip
    return y.to(out_dtype)


def sums_first(target: Target, x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is the only kernel, or, with AMX, the faster one: for more rows than a few to an expert."""
    many = hint(x.shape[0]) > scaled_mm_vnni.FEW * hint(weight.shape[0])
    return not product_of(target) or (many and scaled_mm_int8_cpu.uses_amx(target, x, weight[0]))
