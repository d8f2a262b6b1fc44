"""Quantize a model in place: the compile entrance's capture, passes and quantizer, kept as a model.

Linears become `QuantizedLinear`s one after the other, and experts `QuantizedExperts` stack by stack, each float weight
going as its 8-bit one comes. Smoothing is folded into the parameters that are left; what nothing can absorb stays
unsmoothed, since a checkpoint has no place for it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from qcompile import names, passes, placement
from qcompile.calibration import Batches, Calibration, statistic_for
from qcompile.config import Clip, Config, Dtype
from qcompile.errors import ConfigError
from qcompile.experts_replacement import ExpertsReplacement
from qcompile.linear_replacement import LinearReplacement
from qcompile.memory import give_back
from qcompile.quantized_linear import QuantizedLinear, is_quantized
from qcompile.record import Record
from qcompile.recording import calibrate
from qcompile.smoothing import captured_example, edits_of, example_arguments, with_example


def quantize(
    model: nn.Module,
    calibration: Calibration | Batches,
    *,
    dtype: Dtype = "int8",
    activations: Literal["token", "static"] = "token",
    alpha: float | Literal["auto"] | None = 0.5,
    clip: Clip = "none",
    ignore: tuple[str, ...] = ("lm_head",),
    example: Mapping[str, Any] | Tensor | None = None,
    progress: bool = False,
) -> nn.Module:
    """Quantize `model`'s linears in place; returns it. Their float weights are freed as they go.

    calibration: batches to record, as for `calibrate`, or what it returned for this very model. The other options are
    those of Config; alpha=None means no smoothing. example: the call that the model is captured with, instead of the
    calibration's first. progress: show progress bars on stderr.
    Linears that are no nn.Linear or Conv1D of their own, match `ignore`, or have no part in that call stay in float;
    `model.qcompile_record` says which, why, and what was done. The model is for inference only then.
    Raises ConfigError, CalibrationError (the calibration belongs to another model), CaptureError (several kinds of
    call, or none that torch.compile follows), WeightError (not finite, or an overflow) or, if QCOMPILE_DEBUG has
    verify, VerifyError; then nothing was changed.
    """
    model = names.original(model)
    _check(model, activations)
    # With a number for the batches to come, so that mistakes show before the long part.
    config = Config(dtype=dtype, activations=activations, alpha=alpha, clip=clip, ignore=ignore, calibrate=1)
    if not isinstance(calibration, Calibration):
        calibration = calibrate(model, calibration, ignore=config.ignore, progress=progress)
    calibration = with_example(calibration, model, example)
    config = dataclasses.replace(config, calibrate=0, calibration=calibration)
    give_back(collect=True)
    captured = captured_example(model, calibration)
    graphs = placement.with_linears(captured, config)
    unread = placement.unread(model, graphs)
    placeless = placement.placeless(model, graphs, config, example_arguments(model, calibration))
    statistic = functools.partial(statistic_for, calibration, activations)
    edits, refusals = edits_of(captured, passes.storing(config, placeless), statistic)
    for one in captured:
        one.args.clear()  # Dynamo may keep what captured it, and with it the float weights
    give_back(collect=True)
    replacements: list[LinearReplacement | ExpertsReplacement] = [
        LinearReplacement(model, edits), ExpertsReplacement(model, edits),
    ]  # fmt: skip
    record = Record.of(config, placeless, refusals, unread)
    if not any(map(len, replacements)):
        reason = next(iter(record.kept.items()), ("it", "has no linears"))
        raise ConfigError(f"no linear of {type(model).__name__} can be quantized; {': '.join(reason)}")
    for step in (*edits, *replacements):
        step.check()
    for edit in edits:
        edit.write()
    with _bar(sum(map(len, replacements)), progress) as advance:
        for replacement in replacements:
            replacement.write(advance)
    _untie(model)
    model.requires_grad_(False)
    model.qcompile_record = record  # type: ignore[assignment]
    return model


def _check(model: nn.Module, activations: str) -> None:
    """Raises ConfigError for a quantized model, and for activations that no file can hold."""
    if is_quantized(model) or getattr(model, "quantization_method", None) is not None:
        raise ConfigError(f"{type(model).__name__} is already quantized; quantize the float model it was made from")
    if activations not in ("token", "static"):
        raise ConfigError(f'activations of a stored model must be "token" or "static"; got {activations!r}')


def _untie(model: nn.Module) -> None:
    """A quantized head shares no weight with the embedding it was tied to; transformers must not tie them again."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name in [key for pair in tied.items() for key in pair]:
        if isinstance(model.get_submodule(name.rpartition(".")[0]), QuantizedLinear):
            model.config.tie_word_embeddings = False  # type: ignore[union-attr]
            for key in [key for key, source in tied.items() if name in (key, source)]:
                del tied[key]


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("quantizing", total=total)
        yield lambda: progress.advance(task)
