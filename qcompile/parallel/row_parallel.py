"""A quantized linear whose input channels are shared out to the processes of a group.

Every process holds some columns of the weight and gets the matching channels of x. What one process would compute is
kept to the bit: the largest absolute value of a token is found over all processes before any of them quantizes, and
the sums are added as they are, int32, before the one rounding to float32:

    x_scale = max_r x_scale_r;   sums = Σ_r x̂_r · ŵ_rᵀ;   y = sums · x_scale · weight_scale + bias,      r: processes
"""

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives

from qcompile import ops
from qcompile.quantized_linear import QuantizedLinear


class RowParallelLinear(nn.Module):
    """linear: this process's share, weight [N, K/ranks], everything else whole. group: the name of a process group.

    Inference only; every process of the group has to call it, in the same order.
    """

    def __init__(self, linear: QuantizedLinear, group: str) -> None:
        super().__init__()
        self.linear, self.group = linear, group

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K/ranks] → [..., N] of x's dtype, the same on every process."""
        linear, dtype = self.linear, self.linear.weight.dtype
        if linear.input_scale is None:
            # A scale grows with its absmax, so the largest scale is that of the largest absmax.
            x_scale = self._reduced(ops.row_scale(x, [], dtype, None), "max")
            step = x_scale.unsqueeze(-1)
        else:
            x_scale = step = linear.input_scale.reshape(())
        x_q = torch.ops.qcompile.quantize_static(x, step, [], dtype)
        sums = self._reduced(torch.ops.qcompile.accumulate(x_q, linear.weight), "sum")
        weight_scale = linear.weight_scale.reshape(-1)
        y: Tensor = torch.ops.qcompile.from_sums(sums, x_scale, weight_scale, linear.bias, None, None, x.dtype)
        return y

    def _reduced(self, tensor: Tensor, operation: str) -> Tensor:
        """Waits at once: an unfinished sum is a tensor subclass, which the dialect does not know."""
        started = collectives.all_reduce(tensor, operation, self.group)  # type: ignore[arg-type]
        reduced: Tensor = collectives.wait_tensor(started)  # type: ignore[no-untyped-call]
        return reduced
