"""scaled_mm anywhere: the definition itself, in plain PyTorch.

int8 sums are exact. fp8 is computed by dequantizing to float32, which no CPU does fast: it is for checking numbers.
"""

from torch import Tensor

from qcompile import ops
from qcompile.lowering.target import Target

scaled_mm = ops.REFERENCES[ops.scaled_mm]
accumulate = ops.REFERENCES[ops.accumulate]


def runs_on(target: Target) -> str:
    return ""


def takes(target: Target, x: Tensor, weight: Tensor) -> str:
    return ""
