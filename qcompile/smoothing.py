"""Smooth a float model in place: the same passes as the backend, written back into the parameters."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qcompile import call_arguments, debug, names, passes
from qcompile.calibration import Calibration, StatisticOf, keyword_arguments
from qcompile.capture import capture_in_fewest_graphs
from qcompile.captured import Captured
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
    example: the call that the model is captured with, instead of the calibration's first. Of a model in several graphs,
    what only one of them reads is scaled.
    What is proved is this kind of call, without a KV cache: outputs asked for in another way (hidden states, a part of
    the model called for itself) may come out scaled, and training statistics (BatchNorm) do. Only folds that can be
    written back are made; a linear whose input nothing upstream can absorb stays as it is.
    Raises ConfigError, CalibrationError (recorded on another model), CaptureError (several kinds of call, or none that
    torch.compile follows), WeightError (a parameter would overflow) or, if QCOMPILE_DEBUG has verify, VerifyError; then
    nothing was changed.
    """
    model = names.original(model)
    config = Config(
        alpha=alpha, calibration=calibration, ignore=ignore, power_of_two="drop" if power_of_two else "off"
    )
    if config.alpha is None:
        raise ConfigError("smooth needs alpha, a number in 0…1; got None")
    if config.calibration is None:
        raise ConfigError("smooth needs a calibration; got None; record one with qcompile.calibrate")
    captured = captured_example(model, with_example(config.calibration, model, example))
    edits, _ = edits_of(captured, passes.smoothing(config), config.calibration.statistic)
    for edit in edits:
        edit.check()
    for edit in edits:
        edit.write()
    return model


def with_example(
    calibration: Calibration, model: nn.Module, example: Mapping[str, Any] | Tensor | None
) -> Calibration:
    """The calibration with another call to capture the model with, if one is given. Raises CalibrationError."""
    if example is None:
        return calibration
    call = call_arguments.short_copy(for_model(model, keyword_arguments(model, example)))
    return dataclasses.replace(calibration, example=call, kinds=1)


def captured_example(model: nn.Module, calibration: Calibration) -> list[Captured]:
    """The graphs of the calibration's example. Raises CalibrationError or CaptureError."""
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
    if not captured:
        raise CaptureError(
            f"changing a model in place needs a call that torch.compile follows; nothing of {type(model).__name__}'s "
            "is compiled; take torch.compiler.disable off its forward"
        )
    return captured


def edits_of(
    captured: Sequence[Captured], pipeline: Pipeline, statistic: StatisticOf
) -> tuple[list[ParameterEdits], Refusals]:
    """What a pipeline asks of the parameters that captured graphs read, and what its passes left alone. What a graph
    shares with another reader it leaves as it is (Input.also_read_by). Raises VerifyError."""
    edits: list[ParameterEdits] = []
    refusals: list[Refusal] = []
    for one in captured:
        gm, refused = rewritten(one, pipeline, statistic)
        edits.append(ParameterEdits(gm, one.args, statistic))
        refusals += refused
    return edits, tuple(refusals)


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
