"""Which implementation an operator gets on a target: the first that can run there and take the arguments."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from qcompile import grouped_ops, ops
from qcompile.errors import LoweringError
from qcompile.lowering import (
    scaled_grouped_mm_cpu,
    scaled_grouped_mm_reference,
    scaled_grouped_mm_triton,
    scaled_mm_avx,
    scaled_mm_int8_cpu,
    scaled_mm_int8_float,
    scaled_mm_int_mm,
    scaled_mm_reference,
    scaled_mm_triton,
    scaled_mm_vnni,
)
from qcompile.lowering.devices import without_fp8
from qcompile.lowering.grouped_linear import grouped_linear
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import Table

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A function with the operator's signature, and what it needs of machine and arguments.

    kind: of target that it is written for; "" is any. aware: whether it takes the target and measured tiles by
    keyword. accumulate: its sums alone, of x [M, K] and weight [N, K]; None if it has no such form.
    """

    name: str
    kind: str
    function: Callable[..., Any]
    runs_on: Callable[[Target], str]
    takes: Callable[..., str]
    aware: bool = False
    accumulate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    @classmethod
    def of(cls, name: str, kind: str, module: Any, *, aware: bool = False) -> "Implementation":
        """The implementation in one of this package's files, or in an object with the same functions."""
        sums = getattr(module, "accumulate", None)
        return cls(name, kind, module.scaled_mm, module.runs_on, module.takes, aware, sums)

    @classmethod
    def grouped(cls, name: str, kind: str, module: ModuleType, *, aware: bool = False) -> "Implementation":
        """The same, of products with stacks of matrices."""
        return cls(name, kind, module.scaled_grouped_mm, module.runs_on, module.takes, aware)

    def bound(self, target: Target, measured: Table | None) -> Callable[..., Any]:
        """The function for one target."""
        return functools.partial(self.function, target=target, measured=measured) if self.aware else self.function


SCALED_MM = (
    Implementation.of("vnni", "cpu", scaled_mm_vnni),
    Implementation.of("int8_cpu", "cpu", scaled_mm_int8_cpu),
    Implementation.of("avx512", "cpu", scaled_mm_avx.AVX512),
    Implementation.of("avx2", "cpu", scaled_mm_avx.AVX2),
    Implementation.of("triton", "cuda", scaled_mm_triton, aware=True),
    Implementation.of("int_mm", "cuda", scaled_mm_int_mm),
    Implementation.of("int8_float", "", scaled_mm_int8_float),
    Implementation.of("reference", "", scaled_mm_reference),
)


SCALED_GROUPED_MM = (
    Implementation.grouped("grouped_cpu", "cpu", scaled_grouped_mm_cpu, aware=True),
    Implementation.grouped("grouped_triton", "cuda", scaled_grouped_mm_triton, aware=True),
    Implementation.grouped("grouped_reference", "", scaled_grouped_mm_reference),
)


def select_scaled_mm(target: Target, x: torch.Tensor, weight: torch.Tensor) -> tuple[Implementation, list[str]]:
    """The implementation for a target and (fake) arguments, and why those before it were passed over.

    Implementations for other kinds of target are not worth a word.
    """
    return _first(SCALED_MM, target, x, weight)


def passed_over(target: Target) -> list[str]:
    """Why implementations of products cannot run on a target, up to the first that can."""
    reasons: list[str] = []
    for implementation in SCALED_MM:
        reasons.append(implementation.runs_on(target))
        if not reasons[-1]:
            break
    return reasons


def select_accumulate(target: Target, x: torch.Tensor, weight: torch.Tensor) -> tuple[Implementation, list[str]]:
    """As `select_scaled_mm`, of the implementations that give their sums away."""
    return _first(tuple(one for one in SCALED_MM if one.accumulate is not None), target, x, weight)


def select_scaled_grouped_mm(target: Target, x: torch.Tensor, weight: torch.Tensor) -> tuple[Implementation, list[str]]:
    """As `select_scaled_mm`, for experts. weight: [N, K], of one of them."""
    return _first(SCALED_GROUPED_MM, target, x, weight)


def _first(
    candidates: tuple[Implementation, ...], target: Target, x: torch.Tensor, weight: torch.Tensor
) -> tuple[Implementation, list[str]]:
    refusals: list[str] = []
    for implementation in candidates:
        if implementation.kind not in ("", target.kind):
            continue
        reason = implementation.runs_on(target) or implementation.takes(target, x, weight)
        if not reason:
            return implementation, refusals
        refusals.append(f"{implementation.name}: {reason}")
    raise LoweringError(f"no implementation of scaled_mm runs on {target}: {'; '.join(refusals) or 'there is none'}")


def check_dtype(target: Target, dtype: torch.dtype) -> None:
    """Refuse a dtype that the target has no arithmetic for; warn where it is only emulated."""
    if dtype not in FP8:
        return
    if target.kind == "cpu":
        warnings.warn(
            "fp8 on CPU is computed by dequantizing to float32: right for checking numbers, slower than float",
            stacklevel=2,
        )
    elif target.kind == "cuda" and (reason := without_fp8(target)):
        raise LoweringError(f"{reason}; use dtype='int8'")


def absmax_by_bits(values: torch.Tensor) -> torch.Tensor:
    """As ops.row_absmax, by integers: magnitudes are ordered as their bits are, NaN above all. On GPUs a maximum of
    floats that keeps NaN is three instructions, one of integers is one."""
    return values.abs().view(torch.int32).amax(-1).view(torch.float32)


# Everything but the product itself is elementwise or a row reduction: Inductor fuses the plain definition.
INLINED: dict[Any, Callable[..., Any]] = {
    op: ops.REFERENCES[op] for op in (ops.observe, ops.rescale, ops.quantize, ops.quantize_static, ops.from_sums)
} | {grouped_ops.grouped_linear: grouped_linear}
INLINED_ON = {"cuda": {ops.quantize: functools.partial(ops.REFERENCES[ops.quantize], row_absmax=absmax_by_bits)}}


def inlined(target: Target, op: Any) -> Callable[..., Any]:
    """An operator's definition as Inductor gets it; other operators stay as they are."""
    function: Callable[..., Any] = INLINED_ON.get(target.kind, {}).get(op) or INLINED.get(op, op)
    return function
