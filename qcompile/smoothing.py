"""Smooth a float model in place: the same passes as the backend, written back into the parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qcompile import call_arguments, debug, passes
from qcompile.calibration import Calibration, StatisticOf, keyword_arguments
from qcompile.capture import Captured, capture_in_fewest_graphs
from qcompile.config import Config
from qcompile.errors import CalibrationError, CaptureError, ConfigError
from qcompile.model_limits import without_cache
from qcompile.parameter_edits import ParameterEdits
from qcompile.pass_pipeline import Pipeline
from qcompile.recording import for_model
from qcompile.rewrite import Refusal
from qcompile.validate import Validate

Refusals = tuple[Refusal, ...]


def smooth(
    model: nn.Module,
    calibration: Calibration,
    alpha: float | Literal["auto"] = 0.5,
    *,
    power_of_two: bool = False,
    ignore: tuple[str, ...] = ("lm_head",),
    example: Mapping[str, Any] | Tensor | None = None,
) -> nn.Module:
    """Fold SmoothQuant scales into `model`'s parameters, in place. Float in, float out; the function it computes
    stays the same up to float rounding of its dtype. Returns the model.

    alpha: as in Config; "auto" chooses for int8 with per-token activations. power_of_two: round the scales to powers of
    two, so that even a bfloat16 model computes the very same bits (a gain that is stored as g and used as 1 + g, as
    Gemma's, rounds).
    example: the call that the model is captured with, instead of the calibration's first; it must be one graph.
    What is proved is this kind of call, without a KV cache: outputs asked for in another way (hidden states, a part of
    the model called for itself) may come out scaled, and training statistics (BatchNorm) do. Only folds that can be
    written back are made; a linear whose input nothing upstream can absorb stays as it is.
    Raises ConfigError, CalibrationError (recorded on another model), CaptureError (no single graph), WeightError (a
    parameter would overflow) or, if QCOMPILE_DEBUG has verify, VerifyError; then nothing was changed.
    """
    config = Config(
        alpha=alpha, calibration=calibration, ignore=ignore, power_of_two="drop" if power_of_two else "off"
    )
    if config.alpha is None:
        raise ConfigError("smooth needs alpha, a number in 0…1; got None")
    if config.calibration is None:
        raise ConfigError("smooth needs a calibration; got None; record one with qcompile.calibrate")
    captured = whole_graph(model, with_example(config.calibration, model, example))
    statistic = config.calibration.statistic
    gm, _ = rewritten(captured, passes.smoothing(config), statistic)
    edits = ParameterEdits(gm, captured.args, statistic)
    edits.check()
    edits.write()
    return model


def with_example(
    calibration: Calibration, model: nn.Module, example: Mapping[str, Any] | Tensor | None
) -> Calibration:
    """The calibration with another call to capture the model with, if one is given. Raises CalibrationError."""
    if example is None:
        return calibration
    call = call_arguments.short_copy(for_model(model, keyword_arguments(model, example)))
    return dataclasses.replace(calibration, example=call, kinds=1)


def whole_graph(model: nn.Module, calibration: Calibration) -> Captured:
    """The model's one graph, captured with the calibration's example. Raises CalibrationError or CaptureError."""
    if calibration.kinds > 1:
        raise CaptureError(
            f"changing a model in place proves one kind of call; the calibration saw {calibration.kinds}, with "
            "different arguments; say which by example=…, or use torch.compile, which takes every graph for itself"
        )
    if not calibration.example:
        raise CalibrationError(
            "changing a model in place needs a call to capture it with: tensors, numbers, text, and lists, tuples and "
            "dicts of them; the calibration's had something else among its arguments; calibrate without it"
        )
    captured = capture_in_fewest_graphs(model, example_arguments(model, calibration))
    if len(captured) != 1:
        raise CaptureError(
            f"changing a model in place needs it in one graph; {type(model).__name__} gave {len(captured)}; give a "
            "call that is one by example=…, such as tokens without images, or use torch.compile, which takes any number"
        )
    return captured[0]


def rewritten(captured: Captured, pipeline: Pipeline, statistic: StatisticOf) -> tuple[GraphModule, Refusals]:
    """A captured graph after a pipeline, watched as QCOMPILE_DEBUG asks for, and what the passes left alone. Raises
    VerifyError."""
    config = debug.with_environment(Config())
    watching, validate = debug.observers(config, pipeline), Validate()
    gm, refusals = pipeline.run(captured.graph, [*watching, validate] if config.verify else watching)
    validate.check(captured.args, statistic)
    return gm, refusals


def example_arguments(model: nn.Module, calibration: Calibration) -> dict[str, Any]:
    """The calibration's example call, without a KV cache: a cache in the outputs would pin the value projections,
    and a model whose parameters are scaled fills and reads its own caches consistently."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    arguments: dict[str, Any] = call_arguments.map_tensors(lambda tensor: tensor.to(device), dict(calibration.example))
    return {**arguments, **without_cache(model)}
