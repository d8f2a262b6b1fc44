"""Smooth a float model in place: the same passes as the backend, written back into the parameters."""

from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule

from qcompile import debug, passes
from qcompile.calibration import Calibration
from qcompile.capture import Captured, capture_call
from qcompile.config import Config
from qcompile.errors import CalibrationError, CaptureError, ConfigError
from qcompile.model_limits import without_cache
from qcompile.parameter_edits import ParameterEdits
from qcompile.pass_pipeline import Pipeline
from qcompile.rewrite import Refusal

Refusals = tuple[Refusal, ...]


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
    captured = whole_graph(model, config.calibration)
    gm, _ = rewritten(captured.graph, passes.smoothing(config), ignore)
    edits = ParameterEdits(gm, captured.args, config.calibration.statistic)
    edits.check()
    edits.write()
    return model


def whole_graph(model: nn.Module, calibration: Calibration) -> Captured:
    """The model's one graph, captured with the calibration's example. Raises CalibrationError or CaptureError."""
    if calibration.kinds > 1:
        raise CaptureError(
            f"changing a model in place proves one kind of call; the calibration saw {calibration.kinds}, with "
            "different arguments; calibrate with one, or use torch.compile, which takes every graph for itself"
        )
    if not calibration.example:
        raise CalibrationError("the calibration holds no example input to capture the model with; record it again")
    captured = capture_call(model, example_arguments(model, calibration))
    if len(captured) != 1:
        raise CaptureError(
            f"changing a model in place needs it in one graph; {type(model).__name__} gave {len(captured)}; "
            'use torch.compile(model, backend="w8a8", options={"calibration": …}), which takes every graph'
        )
    return captured[0]


def rewritten(graph: GraphModule, pipeline: Pipeline, ignore: tuple[str, ...]) -> tuple[GraphModule, Refusals]:
    """A captured graph after a pipeline, and what the passes left alone."""
    return pipeline.run(graph, debug.observers(Config(ignore=ignore), pipeline))


def example_arguments(model: nn.Module, calibration: Calibration) -> dict[str, Any]:
    """The calibration's example call, without a KV cache: a cache in the outputs would pin the value projections,
    and a model whose parameters are scaled fills and reads its own caches consistently."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    arguments: dict[str, Any] = {key: value.to(device) for key, value in calibration.example.items()}
    return {**arguments, **calibration.settings, **without_cache(model)}
