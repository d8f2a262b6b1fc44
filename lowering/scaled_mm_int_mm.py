"""scaled_mm, int8 on NVIDIA GPUs that Triton does not compile for, or without Triton: cuBLAS, then the epilogue.

cuBLAS writes int32 sums to memory; Inductor fuses the epilogue into one kernel that reads them back. It takes more than
16 rows only, so fewer are padded with zeros.
"""

import torch
from torch import Tensor

from qcompile.lowering.devices import device_of
from qcompile.lowering.target import Target
from qcompile.products import scaled_mm_of

FEWEST_ROWS = 17


def runs_on(target: Target) -> str:
    """Why this kernel cannot run on a target; empty if it can."""
    device = device_of(target)
    if device is None or not device.int8_cores:
        return f"needs an NVIDIA GPU of compute capability 7.5 or newer, the target is {target}"
    return ""


def takes(target: Target, x: Tensor, weight: Tensor) -> str:
    """Why this kernel cannot take these arguments; empty if it can."""
    if x.dtype != torch.int8:
        return f"needs int8, got {x.dtype}"
    if weight.shape[0] % 8 or weight.shape[1] % 8 or not weight.numel():
        return f"needs K and N to be multiples of 8, got a weight {tuple(weight.shape)}"
    return ""


def accumulate(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] int8, weight [N, K] int8 → sums [M, N] int32."""
    m = x.shape[0]
    padded = x
    if not isinstance(m, int) or m < FEWEST_ROWS:  # a size that only the call knows may be as small
        padded = torch.nn.functional.pad(x, (0, 0, 0, FEWEST_ROWS))
    return torch._int_mm(padded.contiguous(), weight.contiguous().t())[:m]


scaled_mm = scaled_mm_of(accumulate)
