"""Run a quantized model as the compressed-tensors package does in stock transformers: for comparison, not for use.

That package keeps weights dequantized in the model's dtype and rounds activations to a grid of its own: int8 steps of
absmax / 127.5, clamped to −128…127, where vLLM's kernels and ours have absmax / 127 and ±127. Everything is computed in
the model's dtype. With its grid, the same checkpoint gives the same logits here as there.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qcompile.ops import QUANTIZED_MAX
from qcompile.quantized_linear import QuantizedLinear, quantized_linears


@contextlib.contextmanager
def fake_quantized(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block, calling `model` gives what stock transformers computes from its checkpoint."""
    linears = list(quantized_linears(model).values())
    for linear in linears:
        linear.forward = functools.partial(_forward, linear)  # type: ignore[method-assign]
    try:
        yield model
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)


def _forward(linear: QuantizedLinear, x: Tensor) -> Tensor:
    weight = linear.weight.to(x.dtype) * linear.weight_scale.to(x.dtype)
    return nn.functional.linear(_rounded(x, linear.weight.dtype, linear.input_scale), weight, linear.bias)


def _rounded(x: Tensor, dtype: torch.dtype, static: Tensor | None) -> Tensor:
    """x [B, T, K] on the grid, in x's dtype."""
    largest = QUANTIZED_MAX[dtype]
    smallest = -128.0 if dtype == torch.int8 else -largest
    if static is None:
        absmax = x.abs().amax(tuple(range(2, x.ndim)), keepdim=True)
        scale = absmax / ((largest - smallest) / 2)
        scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    else:
        scale = static.to(x.dtype)
    values = (x / scale).clamp(smallest, largest)
    values = values.to(dtype).to(x.dtype) if dtype.is_floating_point else values.round()
    return values * scale
