"""Smooth a float model in place: the same passes as the backend, written back into the parameters."""

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qcompile import debug, names, ops, passes
from qcompile.calibration import Calibration
from qcompile.capture import capture_call
from qcompile.config import Config
from qcompile.errors import CalibrationError, CaptureError, ConfigError, WeightError
from qcompile.passes.parameters import source_of
from qcompile.rewrite import Refusal, args_of, input_of
from qcompile.weights import evaluate


def smooth(
    model: nn.Module,
    calibration: Calibration,
    alpha: float | Literal["auto"] = 0.5,
    *,
    power_of_two: bool = False,
    ignore: tuple[str, ...] = ("lm_head",),
) -> nn.Module:
    """Fold SmoothQuant scales into `model`'s parameters, in place. Float in, float out; the function it computes
    stays the same up to float rounding of its dtype. Returns the model.

    alpha: as in Config; "auto" chooses for int8 with per-token activations. power_of_two: round the scales to powers of
    two, so that even a bfloat16 model computes the very same bits (a gain that is stored as g and used as 1 + g, as
    Gemma's, rounds).
    What is proved is the kind of call that the calibration was recorded with, without a KV cache: outputs asked for in
    another way (hidden states, a part of the model called for itself) may come out scaled, and training statistics
    (BatchNorm) do. Only folds that can be written back are made; a linear whose input nothing upstream can absorb stays
    as it is.
    Raises ConfigError, CalibrationError (recorded on another model), CaptureError (no single graph) or WeightError
    (a parameter would overflow); then nothing was changed.
    """
    config = Config(
        alpha=alpha, calibration=calibration, ignore=ignore, power_of_two="drop" if power_of_two else "off"
    )
    if config.alpha is None:
        raise ConfigError("smooth needs alpha, a number in 0…1; got None")
    if config.calibration is None:
        raise ConfigError("smooth needs a calibration; got None; record one with qcompile.calibrate")
    calibration = config.calibration
    if calibration.kinds > 1:
        raise CaptureError(
            f"smoothing in place proves one kind of call; the calibration saw {calibration.kinds}, with different "
            "arguments; calibrate with one, or use torch.compile, which smooths every graph for itself"
        )
    if not calibration.example:
        raise CalibrationError("the calibration holds no example input to capture the model with; record it again")
    gm, args, _ = smoothed_graph(model, calibration, config)
    _write_back(gm, args, calibration)
    return model


def smoothed_graph(
    model: nn.Module, calibration: Calibration, config: Config
) -> tuple[GraphModule, list[Any], tuple[Refusal, ...]]:
    """The model's graph with smoothing folded into parameters, the captured arguments, and what was not folded."""
    captured = capture_call(model, example_arguments(model, calibration))
    if len(captured) != 1:
        raise CaptureError(
            f"smoothing in place needs the model in one graph; {type(model).__name__} gave {len(captured)}; "
            'use torch.compile(model, backend="w8a8", options={"calibration": …}), which smooths every graph'
        )
    traced, args = captured[0].graph, captured[0].args
    pipeline = passes.smoothing(config)
    gm, refusals = pipeline.run(traced, debug.observers(Config(ignore=config.ignore), pipeline))
    return gm, args, refusals


def example_arguments(model: nn.Module, calibration: Calibration) -> dict[str, Any]:
    """The calibration's example call, without a KV cache: a cache in the outputs would pin the value projections,
    and a model whose parameters are scaled fills and reads its own caches consistently."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    arguments: dict[str, Any] = {key: value.to(device) for key, value in calibration.example.items()}
    arguments |= calibration.settings
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if "use_cache" in parameters or (takes_any and hasattr(getattr(model, "config", None), "use_cache")):
        arguments["use_cache"] = False
    return arguments


def _write_back(gm: GraphModule, args: list[Any], calibration: Calibration) -> None:
    """Compute every new parameter value, then write them all."""
    edits = [node for node in gm.graph.find_nodes(op="call_function", target=ops.rescale) if node.users]
    inputs = []
    for node in gm.graph.find_nodes(op="placeholder"):
        record = input_of(node)
        if record.of is None:
            inputs.append(args[record.index])
        else:
            weight = args[record.of]
            name = names.name_of(weight) or record.name
            inputs.append(calibration.statistic(weight, name, record.field).to(weight.device))
    values = evaluate(gm, inputs, edits)
    targets = [_target(node, args, value) for node, value in zip(edits, values, strict=True)]
    for parameter, value in targets:
        _check_memory(parameter, args)
        if not bool(torch.isfinite(value).all()):
            raise WeightError(
                f"a smoothed parameter must stay finite; {_name(parameter)} does not fit its dtype; nothing was "
                "changed; use another alpha, or load the model in bfloat16 or float32"
            )
    with torch.no_grad():
        for parameter, value in targets:
            parameter.copy_(value)


def _check_memory(parameter: Tensor, args: list[Any]) -> None:
    """Two parameters over the same memory (tied through `.data`) cannot be scaled apart, nor one that is expanded."""
    if any(stride == 0 and size > 1 for stride, size in zip(parameter.stride(), parameter.shape, strict=True)):
        raise CaptureError(
            f"a parameter that is scaled in place must have memory for every element; {_name(parameter)} is expanded; "
            "nothing was changed; make it contiguous"
        )
    if parameter.is_inference():
        raise CaptureError(
            f"a parameter that is scaled in place must be writable; {_name(parameter)} was made in inference mode; "
            "nothing was changed; load the model outside torch.inference_mode()"
        )
    start, end = _span(parameter)
    for other in args:
        if isinstance(other, Tensor) and other is not parameter and other.numel():
            other_start, other_end = _span(other)
            if other_start < end and start < other_end:
                raise CaptureError(
                    f"a parameter that is scaled in place must not share memory with another; {_name(parameter)} and "
                    f"{_name(other)} do; tie them as one Parameter, or clone one of them"
                )


def _name(tensor: Tensor) -> str:
    return names.name_of(tensor) or f"a tensor {list(tensor.shape)}"


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses a tensor reaches, first and one past the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _target(edit: Node, args: list[Any], value: Tensor) -> tuple[Tensor, Tensor]:
    source = source_of(args_of(edit)[0])
    if isinstance(source, str):
        raise CaptureError(f"a folded scale must reach one parameter; {source}")
    parameter: Tensor = args[input_of(source.parameter).index]
    return parameter, source.undo(value)
