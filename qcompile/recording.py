"""Calibration runs: the model, compiled with observers, over the user's data."""

import inspect
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import nn

from qcompile import call_arguments, debug, names
from qcompile.backend import Session
from qcompile.calibration import Batches, Calibration, count_tokens, keyword_arguments
from qcompile.capture import compiled_call, leaving_no_code
from qcompile.config import Config
from qcompile.errors import CalibrationError
from qcompile.memory import give_back
from qcompile.quantized_linear import is_quantized


def calibrate(
    model: nn.Module, batches: Batches, *, ignore: tuple[str, ...] = ("lm_head",), progress: bool = False
) -> Calibration:
    """Record what every linear of `model` reads while it runs over `batches`.

    batches: an iterable of input_ids tensors (int64 [batch, tokens]) or of dicts of keyword arguments.
    ignore: glob patterns over module names, as in Config. progress: show a progress bar on stderr.
    Raises CalibrationError if there is no batch, an empty one, no linear, or an activation that is not finite.
    """
    model = names.original(model)
    if is_quantized(model):
        raise CalibrationError(f"{type(model).__name__} is already quantized; calibrate the float model instead")
    session = Session(debug.with_environment(Config(ignore=ignore, inner="eager")), observe_only=True)
    names.register(model)
    run = compiled_call(model, session.backend)
    example: dict[str, Any] = {}
    kinds: set[Any] = set()
    count = tokens = 0
    with torch.no_grad(), leaving_no_code():
        for batch in _shown(batches, progress):
            arguments = for_model(model, keyword_arguments(model, batch))
            if not all(tensor.numel() for tensor in call_arguments.tensors_in(arguments)):
                raise CalibrationError(f"a calibration batch must hold tokens; batch {count} has an empty tensor")
            example = example or call_arguments.short_copy(arguments)
            kinds.add(call_arguments.kind_of(arguments))
            run(**arguments)
            give_back()  # activations leave holes that the next ones do not all fit
            count, tokens = count + 1, tokens + count_tokens(arguments)
    if not count:
        raise CalibrationError("calibration needs at least one batch; got none; pass an iterable of input_ids")
    statistics = session.recorder.statistics()
    if not statistics:
        raise CalibrationError(
            f"{type(model).__name__} has no linear that ran and is not ignored; there is nothing to calibrate"
        )
    if not call_arguments.is_storable(example):
        example = {}  # a cache, or another object that no file holds
    return Calibration(statistics, count, tokens, example, len(kinds))


def for_model(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments on the model's device; input_ids under the name of the first parameter where the model has another."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" in arguments and "input_ids" not in parameters and not _takes_any(parameters):
        first = next(iter(parameters), "input_ids")
        arguments = {first if key == "input_ids" else key: value for key, value in arguments.items()}
    moved: dict[str, Any] = call_arguments.map_tensors(lambda tensor: tensor.to(device), arguments)
    return moved


def _takes_any(parameters: Any) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def _shown(batches: Batches, progress: bool) -> Iterator[Any]:
    if not progress:
        yield from batches
        return
    from rich.console import Console
    from rich.progress import track

    total = len(batches) if isinstance(batches, Sized) else None
    yield from track(batches, "calibrating", total=total, console=Console(stderr=True))
