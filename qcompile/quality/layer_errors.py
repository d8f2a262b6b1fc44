"""Which layer suffers most: the output error of every quantized linear on the float model's own activations.

Smoothing scales the columns of a weight and, where another layer's scale was folded into it, its rows: Ŵ ≈ r · W · c.
Both are found from the two weights, up to a factor t that r may have and c the inverse of; it is found from the biases,
b̂ = r · b, or from what a linear with static activations reads, x̂ ≈ x / c, and cancels for all others. So layer inputs
are scaled as the quantized layer expects them, and outputs back:

    ŷ = linear_q(x / c) / r,        SQNR = 10 · log10(‖y‖² / ‖ŷ − y‖²) in dB

Every layer is judged alone, on exact inputs; what the layers before it did does not show.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qcompile.quality.window_calls import window_call
from qcompile.quantized_linear import QuantizedLinear, quantized_linears

Ratios = tuple[Tensor, Tensor]
ROWS = 64
ROUNDS = 4  # of alternating least squares; the product of two vectors is found in two when there is no noise


def layer_sqnr(model: nn.Module, against: nn.Module, ids: Tensor) -> dict[str, float]:
    """SQNR in dB of every quantized linear of `model`, by name, on one batch ids [count, size] of the float model."""
    every = quantized_linears(model)
    linears = {name: module for name, module in every.items() if float_weight(against, name) is not None}
    seen = _observe(against, list(linears), ids)
    ratios = {
        name: _ratios(linear, against.get_submodule(name)) for name, linear in linears.items() if name in seen
    }
    _scale_as_read(ratios, {name: linears[name] for name in ratios}, model, against, ids)
    return {name: _sqnr(linears[name], *ratios[name], *seen[name]) for name in ratios}


def _ratios(linear: QuantizedLinear, original: nn.Module) -> Ratios:
    """r [N] and c [K], with the common factor that the biases have."""
    rows, columns = rank_one_ratio(linear.weight.float() * linear.weight_scale, _as_linear(original).float())
    if (actual := _bias(linear)) is None:
        return rows, columns
    bias = rows * original.get_parameter("bias").detach().float()
    factor = float(_ratio(actual @ bias, bias @ bias))
    return rows * factor, columns / factor


def _bias(linear: QuantizedLinear) -> Tensor | None:
    """float32 [N]; None if there is none, or only zeros."""
    return linear.bias.float() if linear.bias is not None and bool(linear.bias.any()) else None


def _scale_as_read(
    ratios: dict[str, Ratios], linears: dict[str, QuantizedLinear], model: nn.Module, against: nn.Module, ids: Tensor
) -> None:
    """Give linears without bias whose activations are static the common factor that their inputs have."""
    names = [name for name, linear in linears.items() if linear.input_scale is not None and _bias(linear) is None]
    if not names:
        return
    some = ids[:1, :ROWS]
    expected, actual = (_observe(one, names, some) for one in (against, model))
    for name in expected.keys() & actual.keys():
        rows, columns = ratios[name]
        factor = float(_ratio(_rms(actual[name][0]), _rms(expected[name][0] / columns)))
        ratios[name] = rows * factor, columns / factor


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def float_weight(model: nn.Module, name: str) -> Tensor | None:
    """The weight [N, K] of a linear (or Conv1D, which holds it transposed) by name; None if there is none."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return _as_linear(module) if isinstance(getattr(module, "weight", None), Tensor) else None


def _as_linear(module: nn.Module) -> Tensor:
    weight = module.get_parameter("weight").detach()
    return weight if isinstance(module, nn.Linear) else weight.t()


def _observe(model: nn.Module, names: list[str], ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Evenly spaced rows of each linear's input [R, K] and output [R, N], float32."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keeper(name: str) -> Any:
        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            seen[name] = _rows(inputs[0]), _rows(output)

        return keep

    handles = [model.get_submodule(name).register_forward_hook(keeper(name)) for name in names]
    try:
        with torch.no_grad():
            model(**window_call(model, ids, logits=False).arguments)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    index = torch.arange(min(ROWS, len(flat)), device=x.device) * len(flat) // min(ROWS, len(flat))
    return flat[index].float()


def _sqnr(linear: QuantizedLinear, rows: Tensor, columns: Tensor, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        actual = linear(x / columns) / rows
    noise = (actual - y).square().sum()
    return float(10 * torch.log10(y.square().sum() / noise.clamp(min=1e-30)))


def rank_one_ratio(scaled: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors r [N] and c [K] with scaled ≈ r · weight · c in the least squares sense; c is 1 on average."""
    rows, columns = torch.ones_like(weight[:, 0]), torch.ones_like(weight[0])
    product, square = weight * scaled, weight.square()
    for _ in range(ROUNDS):
        columns = _ratio(rows @ product, rows.square() @ square)
        rows = _ratio(product @ columns, square @ columns.square())
    mean = columns.mean()
    return rows * mean, columns / mean


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below where that is a positive number, else 1: a channel of zeros has no scale."""
    ratio = above / below
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
