"""int8 by VNNI or AMX: unsigned activations times signed weights.

VNNI and AMX multiply u8 by s8. So the activation is shifted by 128 into u8, and 128 times the weight's row sums comes
off the product:

    Σ_k (x_k + 128)·w_k − 128·Σ_k w_k = Σ_k x_k·w_k,        exact in int32

The row sums depend on the weight alone and are computed once. Inductor fuses the shift into whatever quantizes x.
"""

import torch
from torch import Tensor

from qcompile.lowering.cpu_product import takes_int8
from qcompile.lowering.target import Target

SHIFT = 128
# Beyond it the unsigned sum could leave int32. Weights that others quantized may hold −128.
LARGEST_K = (2**31 - 1) // (255 * 128)


def shifted(x: Tensor) -> Tensor:
    """x [..., K] int8 → [..., K] uint8. By way of float32, which Inductor vectorizes: integers it takes one by one."""
    return (x.to(torch.float32) + SHIFT).to(torch.uint8)


def compensation(weight: Tensor) -> Tensor:
    """weight [..., N, K] int8 → what the shift adds to the sums of each of its rows, [..., N] int32."""
    return SHIFT * weight.sum(-1, dtype=torch.int32)


def takes(target: Target, x: Tensor, weight: Tensor) -> str:
    """Why unsigned activations cannot stand for these arguments; empty if they can."""
    return takes_int8(x, weight, LARGEST_K)
