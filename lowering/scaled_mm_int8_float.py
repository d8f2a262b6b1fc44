"""scaled_mm, int8 on machines without int8 arithmetic that we know of: float32 products, exact.

Products of int8 values are at most 128², and float32 holds integers up to 2^24: sums of 1024 of them are exact, in any
order. Longer sums are cut into such pieces, which are added as int32. As slow as float32, but for few tokens on CPUs:
there a reduction, which Inductor compiles, reads the weights as they are, a quarter of float32's bytes.
"""

import torch
from torch import Tensor

from qcompile.lowering.target import Target
from qcompile.products import scaled_mm_of

PIECE = 2**24 // 128**2
FEW = 4  # tokens up to which a reduction is no slower than a matrix product of converted weights, on one x86


def runs_on(target: Target) -> str:
    """Why this kernel cannot run on a target; empty if it can."""
    return ""


def takes(target: Target, x: Tensor, weight: Tensor) -> str:
    """Why this kernel cannot take these arguments; empty if it can."""
    return "" if x.dtype == torch.int8 else f"needs int8, got {x.dtype}"


def accumulate(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] int8, weight [N, K] int8 → sums [M, N] int32."""
    few = x.device.type == "cpu" and isinstance(x.shape[0], int) and x.shape[0] <= FEW
    multiply = _reduce if few else torch.nn.functional.linear
    sums = x.new_zeros((x.shape[0], weight.shape[0]), dtype=torch.int32)
    for part, weight_part in zip(torch.split(x, PIECE, 1), torch.split(weight, PIECE, 1), strict=True):
        sums = sums + multiply(part.to(torch.float32), weight_part.to(torch.float32)).to(torch.int32)
    return sums


def _reduce(x: Tensor, weight: Tensor) -> Tensor:
    return (x.unsqueeze(1) * weight).sum(-1)


scaled_mm = scaled_mm_of(accumulate)
