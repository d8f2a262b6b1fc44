"""`qcompile.report`: what the compiler did to a model, as one HTML page."""

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import qcompile
from qcompile import names, passes
from qcompile.atomic_file import check_file, write_file
from qcompile.calibration import Batches, Calibration
from qcompile.captured import Captured
from qcompile.config import Config
from qcompile.errors import ConfigError, QCompileError, VerifyError
from qcompile.explanation import (
    SCHEMES,
    captured_example,
    example_call,
    explained_passes,
    explanation_of,
    target_of,
)
from qcompile.model_limits import check_same_tokens
from qcompile.pass_pipeline import pass_text
from qcompile.quantized_linear import is_quantized
from qcompile.record import Record
from qcompile.recording import calibrate
from qcompile.reporting.channels import ChannelReader, Channels, Group, binned
from qcompile.reporting.graphs import Lines, Steps, run_data
from qcompile.reporting.html_page import check_extra, page
from qcompile.reporting.layer_graph import drawing, first_layer
from qcompile.reporting.linears import Link, linear_data, links_of, stored_links
from qcompile.reporting.speed import read_bench
from qcompile.smoothing import example_arguments
from qcompile.validate import Validate
from qcompile.verify import Verify

RANDOM_BATCHES, RANDOM_TOKENS = 4, 64
MOST_BINS, MOST_VALUES = 512, 600_000


@dataclasses.dataclass(frozen=True)
class Report:
    """data: what the page shows. graphs: the model's graphs after all passes, for `qcompile.reporting.graph_export`."""

    data: dict[str, Any]
    graphs: tuple[GraphModule, ...]

    def write(self, out: str | Path) -> None:
        """Write the page, complete or not at all. Raises ConfigError."""
        write_file(out, page(self.data))


def report(
    model: nn.Module,
    out: str | Path | None = "report.html",
    *,
    calibration: Calibration | Batches | None = None,
    inputs: Mapping[str, Any] | Tensor | None = None,
    windows: Tensor | None = None,
    against: nn.Module | None = None,
    bench: str | Path | None = None,
    validate: bool = True,
    target: str | None = None,
    name: str = "",
    notes: Sequence[str] = (),
    **options: Any,
) -> Report:
    """Write a page about what the w8a8 backend does to a model: passes, linears, channels, a layer's graph.

    out: the file; None writes none. calibration: what `calibrate` returned, or batches for it; without, a model with
    weights runs on random tokens, and the page says so. inputs: one call's arguments, as for `explain`. windows: int64
    [count, size] to measure quality against float on. against: the float model that a quantized one was made from.
    bench: a file of `qcompile bench --json`. validate: run every pass's graphs, which takes a few calls of the model.
    target: as for `explain`. name, notes: what the page calls the model and says first. options: of the backend.
    The model may be on the meta device: then what needs weights is left out. Raises ConfigError and what `explain` and
    `calibrate` raise.
    """
    check_extra()
    if out is not None:
        check_file(out)
    config = Config.from_options({**options, "calibration": None, "calibrate": 1})
    speed = None if bench is None else read_bench(bench)
    model = names.original(model)
    if against is not None:
        check_same_tokens(model, against)
    reporter = _Reporter(model, config, list(notes))
    reporter.calibrate(calibration, inputs)
    reporter.run(inputs, target)
    if validate:
        reporter.measure()
    quality = reporter.quality(windows, against, options)
    data = {
        "title": name or type(model).__name__,
        "summary": reporter.summary(name),
        "notes": reporter.notes,
        "quality": quality,
        "speed": speed,
        **reporter.data(),
    }
    found = Report(data, tuple(reporter.finals))
    if out is not None:
        found.write(out)
    return found


class _Reporter:
    """A report being made."""

    def __init__(self, model: nn.Module, config: Config, notes: list[str]) -> None:
        self.model, self.config, self.notes = model, config, notes
        self.finals: list[GraphModule] = []
        self._steps: list[Steps] = []
        self._validators: list[Validate] = []
        self._checks: list[dict[str, dict[str, Any]]] = []
        self._sqnr: dict[str, float] = {}
        self._channels: dict[str, Channels] = {}
        self._groups: list[Group] = []
        self._calibration: Calibration | None = None
        self._on_meta = any(tensor.is_meta for tensor in model.parameters())
        self._is_quantized = is_quantized(model)

    def calibrate(
        self, calibration: Calibration | Batches | None, inputs: Mapping[str, Any] | Tensor | None
    ) -> None:
        """Find statistics of activations, if there are weights to have any: given, of a batch, or of made-up inputs."""
        if self._on_meta:
            self.notes.append("no weights were read: numeric errors, scales, SQNR and channel plots are left out")
        elif self._is_quantized:
            self.notes.append("the model was quantized before it was loaded: its scales are those of its files")
        elif isinstance(calibration, Calibration):
            self._calibration = calibration
        else:
            if calibration is None and inputs is not None:
                self.notes.append("activations are those of the one call that was given")
                calibration = [inputs]
            batches = self._random() if calibration is None else calibration
            self._calibration = calibrate(self.model, batches, ignore=self.config.ignore)

    def _random(self) -> list[dict[str, Any]]:
        example = example_call(self.model)
        self.notes.append("activations are those of random inputs: pass a calibration text to see what your data does")
        generator = torch.Generator().manual_seed(0)
        return [
            {key: _noise(self.model, value, generator) if isinstance(value, Tensor) else value for key, value in call}
            for call in [example.items()] * RANDOM_BATCHES
        ]

    def run(self, inputs: Mapping[str, Any] | Tensor | None, target: str | None) -> None:
        """Capture, and every pass with its observers."""
        self._target = target_of(self.model, self.config, target)
        if inputs is None and self._calibration is not None and self._calibration.example:
            inputs = example_arguments(self.model, self._calibration)
        self._captured: list[Captured] = captured_example(self.model, inputs)
        if not self._captured:
            raise ConfigError(f"a report needs a graph; a call of {type(self.model).__name__} computes nothing")
        pipeline = passes.quantizing(self.config)
        for one in self._captured:
            steps, validator = Steps(), Validate()
            final, _ = pipeline.run(one.graph, [Verify(full=False), steps, validator])
            self.finals.append(final)
            self._steps.append(steps)
            self._validators.append(validator)
            self._checks.append({})
        self._explanation = explanation_of(self._smoothed(), self.config, self._target)

    def measure(self) -> None:
        """What needs weights and activations: translation validation, SQNR, channels."""
        if self._on_meta or (self._calibration is None and not self._is_quantized):
            return
        statistic = self._calibration.statistic if self._calibration is not None else _none_needed
        try:
            for one, steps, validator, checks in zip(
                self._captured, self._steps, self._validators, self._checks, strict=True
            ):
                checks.update({pass_text(taken.step): {"same": True} for taken in steps.taken})
                for text, outcome in validator.outcomes(one.args, statistic):
                    if isinstance(outcome, VerifyError):
                        checks[text] = {"failed": str(outcome)}
                        continue
                    checks[text] = {"error": outcome.error, "limit": outcome.limit}
                    self._sqnr |= outcome.sqnr
            for one, gm in zip(self._captured, self._smoothed(), strict=True):
                reader = ChannelReader(gm, one.args, statistic, self.config.torch_dtype)
                self._channels = reader.channels() | self._channels
                self._groups += reader.groups()
        except QCompileError as error:
            self.notes.append(f"what needs activations is left out: {error}")

    def _smoothed(self) -> list[GraphModule]:
        count = explained_passes(self.config)
        return [steps.graphs(final)[count] for steps, final in zip(self._steps, self.finals, strict=True)]

    def quality(
        self, windows: Tensor | None, against: nn.Module | None, options: Mapping[str, Any]
    ) -> list[tuple[str, Any]] | None:
        """Figures on a text; None without one."""
        if windows is None or self._on_meta:
            return None
        from qcompile.quality.checkpoint import evaluate_checkpoint

        given = {} if self._is_quantized else {**options, "calibration": self._calibration}
        compiled: Any = torch.compile(self.model, backend="w8a8", options={**given, "inner": "eager"}, dynamic=False)
        other = against if self._is_quantized else self.model
        found = evaluate_checkpoint(self.model, windows, against=other, forward=compiled)
        figures: list[tuple[str, Any]] = [
            ("perplexity", found.perplexity), ("mean NLL", found.nll), ("tokens scored", found.tokens),
        ]  # fmt: skip
        if found.against is not None:
            self._sqnr |= found.against.sqnr
            figures += [
                ("float NLL", found.against.nll), ("NLL, change", found.nll - found.against.nll),
                ("KL from float", found.against.kl), ("top-1 agreement", found.against.top1),
            ]  # fmt: skip
        return figures

    def summary(self, name: str) -> list[tuple[str, str]]:
        """What and with what."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        config, record = self.config, getattr(self.model, "qcompile_record", None)
        alpha: Any = "none" if config.alpha is None else config.alpha
        pipeline = passes.quantizing(config).to_text().replace(",", ", ")
        scheme: list[tuple[str, Any]] = [
            ("dtype", config.dtype), ("activations", SCHEMES[config.activations]), ("α", alpha),
        ]  # fmt: skip
        if self._is_quantized:
            scheme = [("scheme", self._explanation.scheme)]
        if isinstance(record, Record) and self._is_quantized:
            scheme = [("dtype", record.dtype), ("activations", record.activations), ("α", record.alpha)]
            scheme += [("calibrated on", f"{record.tokens} tokens of {record.source}"), *record.quality.items()]
        if self._calibration is not None:
            seen = self._calibration
            scheme.append(("calibrated on", f"{seen.tokens} tokens in {seen.batches} batches"))
        found: list[tuple[str, Any]] = [
            ("model", name or type(self.model).__name__), ("class", type(self.model).__name__),
            ("parameters", f"{parameters:,}"), *scheme,
            ("target", str(self._target)), ("pipeline", pipeline),
            ("qcompile", qcompile.__version__), ("torch", torch.__version__), ("Python", platform.python_version()),
        ]  # fmt: skip
        return [(key, str(value)) for key, value in found]

    def data(self) -> dict[str, Any]:
        """Everything below the summary."""
        explanation = self._explanation
        lines, graphs = Lines(), []
        links: dict[str, Link] = {}
        for number, (steps, final, checks) in enumerate(zip(self._steps, self.finals, self._checks, strict=True)):
            graphs.append(run_data(steps, final, checks, lines))
            links = links_of(number, steps) | stored_links(steps.before(0), number) | links
        return {
            "scheme": explanation.scheme,
            "totals": explanation.totals(),
            "lines": lines.lines,
            "sources": lines.sources,
            "graphs": graphs,
            "linears": linear_data(explanation.rows, links, self._channels, self._sqnr, self.config.alpha),
            "channels": _channel_data(self._channels),
            "groups": [dataclasses.asdict(group) for group in self._groups],
            "layer": self._layer(),
        }

    def _layer(self) -> dict[str, Any]:
        final = max(self.finals, key=lambda gm: len(gm.graph.nodes))
        smoothed = self._smoothed()[self.finals.index(final)]
        layer = first_layer(final)
        graph = self.finals.index(final)
        return {"graph": graph, "float": drawing(smoothed, layer), "quantized": drawing(final, layer)}


def _noise(model: nn.Module, like: Tensor, generator: torch.Generator) -> Tensor:
    """Random tokens or pixels in place of an example's."""
    from qcompile.model_limits import positions_of, vocabulary_of

    if like.is_floating_point():
        return torch.randn(like.shape, generator=generator).to(like)
    length = min(RANDOM_TOKENS, positions_of(model) or RANDOM_TOKENS)
    return torch.randint(vocabulary_of(model) or 2, (len(like), length), generator=generator)


def _none_needed(weight: Tensor, name: str, field: str) -> Tensor:
    raise ConfigError(f"a quantized model needs no statistics; {name} asks for {field}")


def _channel_data(channels: Mapping[str, Channels]) -> dict[str, dict[str, Any]]:
    bins = max(16, min(MOST_BINS, MOST_VALUES // max(1, 4 * len(channels))))
    return {
        name: {
            "channels": len(found.x_before),
            "x": [binned(found.x_before, bins), binned(found.x_after, bins)],
            "w": [binned(found.w_before, bins), binned(found.w_after, bins)],
        }
        for name, found in channels.items()
    }
