"""scaled_grouped_mm anywhere: the operator itself, which no compiler looks into. It waits for the offsets."""

from torch import Tensor

from qcompile.grouped_ops import scaled_grouped_mm as scaled_grouped_mm
from qcompile.lowering.target import Target


def runs_on(target: Target) -> str:
    return ""


def takes(target: Target, x: Tensor, weight: Tensor) -> str:
    return ""
