"""Every tolerance the tests use, with its reason. `assert_close` names the row to change when it fails."""

import dataclasses

import torch
from torch import Tensor

from qcompile.validate import relative_error


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Largest allowed ‖actual − expected‖ / ‖expected‖."""

    relative: float
    reason: str


TOLERANCES = {
    "smooth/float64": Tolerance(1e-9, "s·(1/s) in float64 is off by one ulp, 2e-16, and layers add up"),
    "smooth/float32": Tolerance(2e-6, "one rounding of 2^-24 per scaled parameter, averaged over channels"),
    "smooth/bfloat16": Tolerance(2e-2, "one more bf16 rounding (2^-9) per folded parameter, a few layers deep"),
    "smooth/float16": Tolerance(3e-3, "one more fp16 rounding (2^-12) per folded parameter, a few layers deep"),
    "rewrite/float64": Tolerance(1e-12, "the same sums, perhaps in another order"),
    "rewrite/float32": Tolerance(2e-6, "the same sums, perhaps in another order"),
    "rewrite/bfloat16": Tolerance(2e-2, "epilogues keep float32 where separate ops round to bf16 (2^-9)"),
    "rewrite/float16": Tolerance(3e-3, "epilogues keep float32 where separate ops round to fp16 (2^-12)"),
    "attention/float32": Tolerance(2e-6, "the same sums in another order, exp2 to a few units in the last place"),
    "attention/bfloat16": Tolerance(1e-2, "softmax's weights and the result are rounded to bf16 (2^-9), as flash does"),
    "attention/float16": Tolerance(2e-3, "softmax's weights and the result are rounded to fp16 (2^-12)"),
    "int8/linear": Tolerance(2e-2, "two operands with errors uniform in ±scale/2, scale = absmax/127, Gaussian data"),
    "fp8/linear": Tolerance(6e-2, "e4m3 keeps 3 mantissa bits: half an ulp is 2^-4 relative at worst, 2^-5.5 rms"),
    "fp8_e5m2/linear": Tolerance(1.2e-1, "e5m2 keeps 2 mantissa bits: twice the error of e4m3"),
    "int8/model": Tolerance(6e-2, "per-linear errors of 1e-2 through a few random layers"),
    "fp8/model": Tolerance(1.5e-1, "per-linear errors of 5e-2 through a few random layers"),
    "int8/random model": Tolerance(2e-2, "two operands of each linear off by up to absmax/254, up to two blocks"),
    "int8/another device": Tolerance(1e-2, "float32 sums in another order flip some roundings to int8 or fp8"),
    "fp8/another device": Tolerance(6e-2, "some GPUs keep 14 bits of an fp8 sum (3e-3 at K = 14336): roundings flip"),
    "int8/slots": Tolerance(1e-2, "the same int8 products in other shapes: 1e-7, but a rounding may flip"),
    "fp8/processes": Tolerance(1e-2, "float32 sums in another order, 1e-7, but a rounding to fp8 may flip"),
    "inductor/float32": Tolerance(1e-5, "Inductor fuses and reorders float32 sums; int8 rounding flips are rare"),
}


def assert_close(row: str, *, actual: Tensor, expected: Tensor) -> None:
    """Relative L2 error within the named row of TOLERANCES; shapes and dtypes equal."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype} != {expected.dtype}"
    error = relative_error(actual, expected)
    limit = TOLERANCES[row]
    assert error <= limit.relative, f"error {error:.3e} > {limit.relative:.0e} (TOLERANCES[{row!r}]: {limit.reason})"


def row_for(kind: str, dtype: torch.dtype) -> str:
    return f"{kind}/{str(dtype).removeprefix('torch.')}"
