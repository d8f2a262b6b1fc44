"""A linear that holds its weight in 8 bits: what `qcompile.quantize` leaves, what checkpoints are loaded into.

Its forward is written in the dialect. Eager PyTorch runs the operators' definitions, slowly; `torch.compile` with the
w8a8 backend finds them in the captured graph and treats them as if its own passes had put them there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qcompile import ops
from qcompile.errors import ConfigError


class QuantizedLinear(nn.Module):
    """y = x̂ · ŵᵀ + bias, with x quantized per token, or per tensor by a calibrated scale.

    weight [N, K] int8 or fp8; weight_scale [N, 1] float32; bias [N] or None; input_scale [1] float32, or None for
    dynamic per-token activations. is_conv1d: stands in for transformers' Conv1D, which formats list by its own name.
    Inference only.
    """

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        *,
        is_conv1d: bool = False,
    ) -> None:
        super().__init__()
        self.is_conv1d = is_conv1d
        self.out_features, self.in_features = weight.shape
        self.weight = _constant(weight)
        self.weight_scale = _constant(weight_scale.reshape(-1, 1).to(torch.float32))
        self.bias = None if bias is None else _constant(bias)
        # Siblings that read one tensor may share one scale object, so that a graph sees that they share it.
        self.input_scale = None if input_scale is None else _constant(input_scale)

    @classmethod
    def empty(
        cls, shape: tuple[int, int], dtype: torch.dtype, bias_dtype: torch.dtype | None, static: bool
    ) -> "QuantizedLinear":
        """One on the meta device, to be filled by a loader. bias_dtype: None for no bias."""
        rows = shape[0]
        return cls(
            torch.empty(shape, dtype=dtype, device="meta"),
            torch.empty(rows, 1, dtype=torch.float32, device="meta"),
            None if bias_dtype is None else torch.empty(rows, dtype=bias_dtype, device="meta"),
            torch.empty(1, dtype=torch.float32, device="meta") if static else None,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N] of x's dtype. Raises ConfigError."""
        if not is_wide(x):
            raise ConfigError(
                f"a quantized linear must read float16, bfloat16, float32 or float64; got {x.dtype}: the model casts "
                "what it reads to the dtype of its weight; leave this linear in float, by ignore"
            )
        dtype, scale = self.weight.dtype, self.input_scale
        if scale is None:
            x_q, x_scale = torch.ops.qcompile.quantize(x, [], "row", dtype)
        else:
            x_scale = scale.reshape(())
            x_q = torch.ops.qcompile.quantize_static(x, x_scale, [], dtype)
        weight_scale = self.weight_scale.reshape(-1)
        y: Tensor = torch.ops.qcompile.scaled_mm(
            x_q, self.weight, x_scale, weight_scale, self.bias, None, None, x.dtype
        )
        return y

    def extra_repr(self) -> str:
        dtype = next(name for name, kind in ops.TORCH_DTYPES.items() if kind == self.weight.dtype)
        activations = "token" if self.input_scale is None else "static"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {dtype}, {activations}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves between devices. A change of dtype concerns the bias alone: 8-bit weights and their scales are no
        numbers on their own, so `fn` gets to see their bits."""
        kept = {name: getattr(self, name) for name in ("weight", "weight_scale", "input_scale")}
        for name, parameter in kept.items():
            if parameter is not None:
                delattr(self, name)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, parameter in kept.items():
            if parameter is not None:
                setattr(self, name, filled(parameter, fn))
        return self


def is_wide(x: Tensor) -> bool:
    """Whether a linear that quantizes its input can read it: a float of 16 bits or more."""
    return x.is_floating_point() and x.itemsize > 1


def filled(parameter: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """The parameter with what fn makes of its bits: the same object, which others may share, except across the meta
    device."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[parameter.dtype.itemsize]
    data = fn(parameter.data.view(bits)).view(parameter.dtype)
    if parameter.is_meta != data.is_meta:
        return _constant(data)
    parameter.data = data
    return parameter


def _constant(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad=False)


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized linears of a model by qualified name; a module with two names is listed under both."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, QuantizedLinear)}


def is_quantized(model: nn.Module) -> bool:
    """Whether some linear of the model is quantized, or some stack of experts."""
    from qcompile.quantized_experts import QuantizedExperts

    return any(isinstance(module, QuantizedLinear | QuantizedExperts) for module in model.modules())
