"""Which implementation an operator gets on a target: the first that can run there and take the arguments."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch

from qcompile import ops
from qcompile.errors import LoweringError
from qcompile.lowering import scaled_mm_int8_cpu, scaled_mm_reference
from qcompile.lowering.target import Target

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A function with the operator's signature, and what it needs of machine and arguments."""

    name: str
    function: Callable[..., Any]
    runs_on: Callable[[Target], str]
    takes: Callable[..., str]


SCALED_MM = (
    Implementation("int8_cpu", scaled_mm_int8_cpu.scaled_mm, scaled_mm_int8_cpu.runs_on, scaled_mm_int8_cpu.takes),
    Implementation("reference", scaled_mm_reference.scaled_mm, scaled_mm_reference.runs_on, scaled_mm_reference.takes),
)


def select_scaled_mm(target: Target, x: torch.Tensor, weight: torch.Tensor) -> tuple[Implementation, list[str]]:
    """The implementation for a target and (fake) arguments, and why the ones before it were passed over."""
    refusals: list[str] = []
    for implementation in SCALED_MM:
        reason = implementation.runs_on(target) or implementation.takes(x, weight)
        if not reason:
            return implementation, refusals
        refusals.append(f"{implementation.name}: {reason}")
    raise LoweringError(f"no implementation of scaled_mm runs on {target}: {'; '.join(refusals)}")


def check_dtype(target: Target, dtype: torch.dtype) -> None:
    """Refuse a dtype that the target has no arithmetic for; warn where it is only emulated."""
    if dtype not in FP8:
        return
    if target.kind == "cpu":
        warnings.warn(
            "fp8 on CPU is computed by dequantizing to float32: right for checking numbers, slower than float",
            stacklevel=2,
        )
    elif target.kind == "cuda" and target.capability < 89:
        raise LoweringError(f"fp8 needs compute capability 8.9 or newer; this is {target}; use dtype='int8'")


# Everything but the product itself is elementwise or a row reduction: Inductor fuses the plain definition.
INLINED = {op: ops.REFERENCES[op] for op in (ops.observe, ops.rescale, ops.quantize, ops.quantize_static)}
