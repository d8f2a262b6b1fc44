"""Calibration runs: the model, compiled with observers, over the user's data."""

import inspect
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn

from qcompile import debug, names
from qcompile.backend import Session
from qcompile.calibration import Batches, Calibration, count_tokens, keyword_arguments
from qcompile.capture import compiled_call
from qcompile.config import Config
from qcompile.errors import CalibrationError
from qcompile.memory import give_back
from qcompile.quantized_linear import is_quantized

PLAIN = (bool, int, float, str, type(None))
LONGEST_EXAMPLE = 32  # tokens kept of the first batch; enough to capture the graph again


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
    kinds: set[frozenset[tuple[str, str]]] = set()
    count = tokens = 0
    for batch in _shown(batches, progress):
        arguments = for_model(model, keyword_arguments(model, batch))
        if any(isinstance(value, Tensor) and not value.numel() for value in arguments.values()):
            raise CalibrationError(f"a calibration batch must hold tokens; batch {count} has an empty tensor")
        example = example or shorten(arguments)
        kinds.add(_kind(arguments))
        with torch.no_grad():
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
    tensors = {key: value for key, value in example.items() if isinstance(value, Tensor)}
    settings = {key: value for key, value in example.items() if key not in tensors}
    if not all(isinstance(value, PLAIN) for value in settings.values()):
        tensors, settings = {}, {}  # a cache or a list of them: no call that a file could hold
    return Calibration(statistics, count, tokens, tensors, settings, len(kinds))


def for_model(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments on the model's device; input_ids under the name of the first parameter where the model has another."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" in arguments and "input_ids" not in parameters and not _takes_any(parameters):
        first = next(iter(parameters), "input_ids")
        arguments = {first if key == "input_ids" else key: value for key, value in arguments.items()}
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in arguments.items()}


def _takes_any(parameters: Any) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def shorten(arguments: dict[str, Any]) -> dict[str, Any]:
    """A call with the first row of integer inputs only, cut to 32 tokens; other values whole. Copies tensors."""
    return {
        key: (value[:1, :LONGEST_EXAMPLE] if value.ndim == 2 and not value.is_floating_point() else value).clone()
        if isinstance(value, Tensor)
        else value
        for key, value in arguments.items()
    }


def _kind(arguments: dict[str, Any]) -> frozenset[tuple[str, str]]:
    """What tells calls apart that may take different paths through a model: their arguments, and plain values."""
    return frozenset(
        (key, repr(value) if isinstance(value, PLAIN) else type(value).__name__) for key, value in arguments.items()
    )


def _shown(batches: Batches, progress: bool) -> Iterator[Any]:
    if not progress:
        yield from batches
        return
    from rich.console import Console
    from rich.progress import track

    total = len(batches) if isinstance(batches, Sized) else None
    yield from track(batches, "calibrating", total=total, console=Console(stderr=True))
