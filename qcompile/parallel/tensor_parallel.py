"""Shard a loaded model's quantized linears over processes, by the plan that transformers has for the model.

The plan is read as data. Column parallel ("colwise": q, k, v, gate, up): weight, weight scale and bias are cut by
output channels, and nothing else changes. Row parallel ("rowwise": o, down): the weight is cut by input channels
(`row_parallel`). Everything that is not quantized stays whole on every process.
"""

import re
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qcompile.errors import ConfigError
from qcompile.parallel.row_parallel import RowParallelLinear
from qcompile.quantized_linear import QuantizedLinear, quantized_linears

Cut = Literal["colwise", "rowwise"]
# Styles of modules that every process keeps whole (they concern gradients).
WHOLE = ("replicated_with_grad_allreduce", "replicate")


def shard(model: nn.Module, rank: int, size: int, group: str) -> None:
    """Leave in a quantized model, in place, the share of process `rank` of `size`. group: a process group's name.

    Raises ConfigError, with nothing changed, for what cannot be cut.
    """
    for name, cut in cuts(model, size).items():
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, QuantizedLinear)
        share = _share(linear, cut, rank, size)
        setattr(model.get_submodule(parent), child, RowParallelLinear(share, group) if cut == "rowwise" else share)


def cuts(model: nn.Module, size: int) -> dict[str, Cut]:
    """How each quantized linear that is cut is cut, by qualified name. Raises ConfigError."""
    plan: dict[str, str] = getattr(model, "tp_plan", None) or {}
    kind = type(model).__name__
    if not plan:
        raise ConfigError(
            f"tensor parallel follows transformers' plan for the model; {kind} has none; run it in one process"
        )
    linears = quantized_linears(model)
    styles = {name: plan[pattern] for name in linears if (pattern := _pattern(name)) in plan}
    if not styles:
        raise ConfigError(
            f"tensor parallel cuts quantized linears; the plan for {kind} names none of them; run it in one process"
        )
    _check_styles(styles)
    _check_named(styles, linears)
    _check_blocks(model, plan, styles)
    _check_heads(model, size)
    found: dict[str, Cut] = {name: "rowwise" if style == "rowwise" else "colwise" for name, style in styles.items()}
    for name, cut in found.items():
        _check_size(model, name, cut, size)
    return found


def _pattern(name: str) -> str:
    """A name as plans write it: a star for every number."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _check_styles(styles: dict[str, str]) -> None:
    for name, style in styles.items():
        if style not in ("colwise", "rowwise"):
            raise ConfigError(
                f"tensor parallel knows the plan styles colwise and rowwise; {name} is {style}; run it in one process"
            )


def _check_named(styles: dict[str, str], linears: dict[str, QuantizedLinear]) -> None:
    layers = {_layer(name) for name in styles}
    for name in linears:
        if name not in styles and _layer(name) in layers:
            raise ConfigError(
                f"a plan must name every quantized linear of a layer that it cuts; {name} is not named; "
                "run it in one process"
            )


def _layer(name: str) -> str:
    """Up to the first number: model.layers.0."""
    found = re.match(r".*?\.\d+(?=\.|$)", name)
    return found[0] if found else name


def _check_blocks(model: nn.Module, plan: dict[str, str], styles: dict[str, str]) -> None:
    """Whatever else a plan cuts in a module with cut linears would have another width than they have."""
    blocks = {_parent(name) for name in styles}
    for name in _names(model):
        style = plan.get(_pattern(name))
        if style is None or style in WHOLE or name in styles or _parent(name) not in blocks:
            continue
        raise ConfigError(
            f"tensor parallel needs all of {_parent(name)} quantized that its plan cuts; {name} is not; "
            "quantize it too, or run it in one process"
        )


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _names(model: nn.Module) -> Iterator[str]:
    for name, _ in model.named_modules():
        yield name
    for name, _ in model.named_parameters():
        yield name


def _check_heads(model: nn.Module, size: int) -> None:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if config is not None else None
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, key, None)
        if isinstance(heads, int) and heads % size:
            raise ConfigError(f"the number of processes must divide {key}, {heads}; got {size} processes; start fewer")


def _check_size(model: nn.Module, name: str, cut: Cut, size: int) -> None:
    linear: Any = model.get_submodule(name)
    # Output channels of an attention come in heads.
    head = getattr(model.get_submodule(_parent(name)), "head_dim", 1) if cut == "colwise" else 1
    what, channels = ("output", linear.out_features) if cut == "colwise" else ("input", linear.in_features)
    if channels % (size * head):
        unit = f" in heads of {head}" if head != 1 else ""
        raise ConfigError(
            f"the number of processes must divide the {what} channels of {name}, {channels}{unit}; "
            f"got {size} processes; start fewer"
        )


def _share(linear: QuantizedLinear, cut: Cut, rank: int, size: int) -> QuantizedLinear:
    weight, scale, bias = _part(linear.weight, int(cut == "rowwise"), rank, size), linear.weight_scale, linear.bias
    if cut == "rowwise":
        return QuantizedLinear(weight, scale, bias, linear.input_scale, is_conv1d=linear.is_conv1d)
    scale_part = _part(scale, 0, rank, size)
    bias_part = None if bias is None else _part(bias, 0, rank, size)
    return QuantizedLinear(weight, scale_part, bias_part, linear.input_scale, is_conv1d=linear.is_conv1d)


def _part(tensor: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """A copy, also where a view would do: the whole is to be let go."""
    length = tensor.shape[dim] // size
    return tensor.detach().narrow(dim, rank * length, length).clone(memory_format=torch.contiguous_format)
