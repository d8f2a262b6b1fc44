"""Run a quantized model with some of its linears swapped for their float originals.

Smoothing changed the float model before it was quantized: a linear's columns took s, and its rows took 1/s of the
linear that follows. So an original fits in only as r · W · (c · x), with r and c found from the two weights
(quality.layer_errors.rank_one_ratio), and the bias that the quantized linear has, which took 1/s too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.errors import ConfigError
from qcompile.quality.layer_errors import float_weight, rank_one_ratio
from qcompile.quantized_linear import QuantizedLinear, quantized_linears


class SwappedLinears:
    """A quantized model and its float original as a subject of bisection. Its passes are behind it: there are no
    steps."""

    steps: Sequence[tuple[str, bool]] = ()

    def __init__(self, model: nn.Module, against: nn.Module) -> None:
        """Raises ConfigError if the two do not belong together."""
        self.model = model
        self._linears = _distinct(quantized_linears(model))
        self.linears = tuple(self._linears)
        if not self._linears:
            raise ConfigError(f"{type(model).__name__} has no quantized linear; bisect a float model without against")
        self._originals = {name: _original(name, linear, against) for name, linear in self._linears.items()}

    def run_first(self, steps: int, arguments: dict[str, Any]) -> Any:
        """Call the model with none of its linears quantized: the only number of steps to have done is 0."""
        assert steps == 0
        return self.run_only((), arguments)

    def run_only(self, linears: Sequence[str] | None, arguments: dict[str, Any]) -> Any:
        """Call the model with the float originals of all linears but these. None: as it is."""
        kept = set(self.linears if linears is None else linears)
        swapped = [(self._linears[name], forward) for name, forward in self._originals.items() if name not in kept]
        try:
            for linear, forward in swapped:
                linear.forward = forward  # type: ignore[assignment, method-assign]
            return self.model(**arguments)
        finally:
            for linear, _ in swapped:
                vars(linear).pop("forward", None)


def _distinct(linears: dict[str, QuantizedLinear]) -> dict[str, QuantizedLinear]:
    """Each module under its first name."""
    seen: dict[QuantizedLinear, str] = {}
    for name, linear in linears.items():
        seen.setdefault(linear, name)
    return {name: linear for linear, name in seen.items()}


def _original(name: str, linear: QuantizedLinear, against: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the linear would compute in float, in the smoothed model: x [..., K] → [..., N]."""
    weight = float_weight(against, name)
    if weight is None or weight.shape != linear.weight.shape:
        found = "none" if weight is None else f"{list(weight.shape)}"
        raise ConfigError(
            f"against must be the float model this one was made from; for {name} it must have a weight "
            f"{list(linear.weight.shape)}; it has {found}"
        )
    rows, columns = rank_one_ratio(linear.weight.float() * linear.weight_scale, weight.float())

    def forward(x: Tensor) -> Tensor:
        y = nn.functional.linear(x * columns.to(x.dtype), weight.to(x.dtype)) * rows.to(x.dtype)
        return y if linear.bias is None else y + linear.bias.to(y.dtype)

    with torch.no_grad():
        return forward
