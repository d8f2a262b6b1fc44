"""What smoothing and quantizing do to one architecture: how much is covered, and how exact it is.

Everything is computed in float64 over the captured graphs (graphs.InFloat64), so an error of 1e-10 would show.
"""

import dataclasses
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architectures import tiny
from graphs import InFloat64, widened
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qcompile import Config, ops, passes
from qcompile.backend import CompiledGraph, Session
from qcompile.capture import capture_call
from qcompile.captured import Captured
from qcompile.pass_pipeline import Pipeline
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears, info_of, linears, parameters_in
from qcompile.passes.parameters import Source, source_of
from qcompile.passes.smooth import Smooth
from qcompile.rewrite import args_of, copy_graph, input_of, output_of, shape_of, static_nodes
from qcompile.validate import graph_inputs, relative_error

aten = torch.ops.aten
Statistic = Callable[[Tensor, str, str], Tensor]
EXACT = 1e-10  # largest relative change that smoothing alone may cause
BITES = 1e-6  # smallest change that must follow when one compensation is left out
UNSEEN = 1e-13  # changes below are rounding: nothing that is read depends on the value
# Products that may be left beside linears, and where their two factors stand.
PRODUCTS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}


@dataclasses.dataclass
class Macs:
    """Multiply-accumulates of one call, by what happens to them. folded, absorbed: smoothed in front of a quantized
    linear, in parameters or at run time. kept: linears left in float. Heads, routers, and experts that tokens meet by
    bmm are counted apart."""

    quantized: float = 0.0
    folded: float = 0.0
    absorbed: float = 0.0
    kept: float = 0.0
    head: float = 0.0
    routers: float = 0.0
    experts: float = 0.0

    def __iadd__(self, other: "Macs") -> "Macs":
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self


@dataclasses.dataclass
class Report:
    """One architecture. cause: why it was not built, captured or quantized; empty if it was.

    calibrated, adversarial: largest relative change of any output under smoothing alone. in_place: the same when scales
    are written back into parameters, as qcompile.smooth does.
    edits: how many factors parameters take. dead: of these, on what no output depends. loose: that do not bite.
    w8a8, plain: relative error of the first output with smoothing and without. notes: linears left in float, and why.
    """

    name: str
    model: str = ""
    cause: str = ""
    dtype: str = ""
    graphs: int = 0
    macs: Macs = dataclasses.field(default_factory=Macs)
    linears: dict[str, str] = dataclasses.field(default_factory=dict)
    kept: dict[str, str] = dataclasses.field(default_factory=dict)
    calibrated: float = 0.0
    adversarial: float = 0.0
    in_place: float = 0.0
    finite: bool = True
    edits: int = 0
    dead: list[str] = dataclasses.field(default_factory=list)
    loose: list[str] = dataclasses.field(default_factory=list)
    w8a8: float = 0.0
    plain: float = 0.0
    compiled: str = ""
    seconds: float = 0.0


def measure(name: str, *, bite: bool = True, errors: bool = True) -> Report:
    """Build, capture and check one architecture. Never raises: what went wrong is the report's cause."""
    start, report = time.perf_counter(), Report(name)
    try:
        report.model = tiny.model_class(name).__name__
        _measure(report, bite, errors)
    except Stopped as stopped:
        report.cause = str(stopped)
    except Exception as error:
        report.cause = f"check failed: {_line(error)} at {_place(error)}"
    report.seconds = time.perf_counter() - start
    torch._dynamo.reset()
    return report


class Stopped(Exception):
    """The cause that goes into the report."""


def _measure(report: Report, bite: bool, errors: bool) -> None:
    model, arguments = callable_model(report)
    try:
        captured = capture_call(model, arguments)
    except Exception as error:
        raise Stopped(f"not captured: {_line(error)}") from error
    report.graphs = len(captured)
    if not any(has_linears(subject.graph) for subject in captured):
        raise Stopped("captured, but it has no linears")
    for subject in captured:
        if has_linears(subject.graph):
            _measure_graph(report, subject, bite, errors)


def callable_model(report: Report) -> tuple[nn.Module, dict[str, Any]]:
    """A model that runs by itself, in bfloat16 if it can, with arguments."""
    found: dict[str, str] = {}
    for dtype in (torch.bfloat16, torch.float32):
        report.dtype = str(dtype).removeprefix("torch.")
        try:
            model = tiny.build(report.name, dtype)
        except Exception as error:
            raise Stopped(f"not built: {_line(error)}") from error
        try:
            arguments = tiny.example(report.name, model, dtype)
            with torch.no_grad():
                model(**arguments)
        except Exception as error:
            found[report.dtype] = _line(error)
            continue
        return model, arguments
    raise Stopped(f"does not run by itself: {found['float32']}")


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:240]}"


def _place(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def has_linears(gm: GraphModule) -> bool:
    gm, _ = Pipeline((Canonicalize(), FindLinears(()))).run(gm)
    return bool(linears(gm))


def _measure_graph(report: Report, subject: Captured, bite: bool, errors: bool) -> None:
    gm, _ = Pipeline((Canonicalize(), FindLinears(), Smooth(0.5))).run(subject.graph)
    count(report, gm)
    expected = outputs(subject.graph, subject, {})
    report.finite &= all(bool(value.isfinite().any()) for value in expected)
    known = calibrated(subject)
    report.calibrated = max(report.calibrated, change(outputs(gm, subject, known), expected))
    forced = ForcedScales(gm)
    report.adversarial = max(report.adversarial, change(forced.outputs(subject, known), expected))
    report.in_place = max(report.in_place, change(written_back(subject, known), expected))
    if bite:
        check_bites(report, forced, expected)
    if errors:
        _measure_quantized(report, subject, known, expected)


def outputs(gm: GraphModule, subject: Captured, known: dict[Any, Tensor]) -> list[Tensor]:
    """What a graph returns in float64, floating-point tensors only. known: statistics by (index of weight, field)."""
    torch.manual_seed(0)
    return _floats(InFloat64(gm).run(*inputs(gm, subject, known)))


def inputs(gm: GraphModule, subject: Captured, known: dict[Any, Tensor]) -> list[Any]:
    records = [input_of(node) for node in gm.graph.find_nodes(op="placeholder")]
    named = {(r.name, r.field): known[r.of, r.field] for r in records if r.of is not None}
    return graph_inputs(gm, subject.args, lambda weight, name, field: named[name, field])


def _floats(values: Any) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex())]


def change(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference of any output."""
    pairs = zip(map(_real, actual), map(_real, expected), strict=True)
    return max((relative_error(left, right) for left, right in pairs), default=0.0)


def _real(value: Tensor) -> Tensor:
    return torch.view_as_real(value) if value.is_complex() else value


def calibrated(subject: Captured) -> dict[Any, Tensor]:
    """Statistics of the captured call itself, as a calibration run records them."""
    gm, _ = passes.observing(Config()).run(subject.graph)
    results = InFloat64(gm).run(*inputs(gm, subject, {}))
    observed = gm.meta["observed"]
    count = len(results) - 2 * len(observed)
    known: dict[Any, Tensor] = {}
    for siblings, absmax, rows in zip(observed, results[count::2], results[count + 1 :: 2], strict=True):
        for index in siblings:
            known[index, "absmax"] = torch.maximum(known.get((index, "absmax"), absmax), absmax)
            known[index, "rows"] = rows
    return known


class ForcedScales(InFloat64):
    """Runs a smoothed graph with every smoothing scale log-uniform over 1e-3…1e3."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        if target is not ops.smoothing_scale:
            return result
        generator = torch.Generator().manual_seed(int(result.numel()))
        forced = 10 ** (torch.rand(result.shape, generator=generator, dtype=result.dtype) * 6 - 3)
        forced[0] = 1.0  # means "not scaled"
        return forced

    def outputs(self, subject: Captured, known: dict[Any, Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        return _floats(self.run(*inputs(self.module, subject, known)))

    def without(self, node: Node, factors: list[Any]) -> list[Tensor]:
        """Outputs with other factors at one rescale; everything that does not depend on it is kept."""
        later = {node, output_of(self.module.graph)}
        for candidate in self.module.graph.nodes:
            if any(operand in later for operand in candidate.all_input_nodes):
                later.add(candidate)
        env = {key: value for key, value in self.env.items() if key not in later}
        x, original = node.args
        complete = self.env
        try:
            node.args = (x, factors)
            return _floats(self.run(initial_env=env))
        finally:
            node.args = (x, original)
            self.env = complete


def written_back(subject: Captured, known: dict[Any, Tensor]) -> list[Tensor]:
    """Outputs of the captured graph on parameters that took forced scales."""
    step = Smooth(0.5, absorb=False, edit="parameter")
    gm, _ = Pipeline((Canonicalize(), FindLinears(), step)).run(subject.graph)
    forced = ForcedScales(gm)
    forced.outputs(subject, known)
    args = list(subject.args)
    for edit in gm.graph.find_nodes(op="call_function", target=ops.rescale):
        if edit.users:
            source = source_of(args_of(edit)[0])
            assert isinstance(source, Source)
            args[input_of(source.parameter).index] = source.undo(forced.env[edit])
    return outputs(subject.graph, Captured(subject.graph, args), {})


def check_bites(report: Report, forced: ForcedScales, expected: list[Tensor]) -> None:
    """Leave out each factor that a parameter takes, one at a time."""
    static = static_nodes(forced.module)
    for node in forced.module.graph.find_nodes(op="call_function", target=ops.rescale):
        if args_of(node)[0] not in static or not node.users:
            continue
        factors = list(args_of(node)[1])
        for factor in factors:
            report.edits += 1
            missing = change(forced.without(node, [f for f in factors if f is not factor]), expected)
            if missing <= UNSEEN:
                report.dead.append(_edit(node))
            elif missing < BITES:  # NaN is no answer either, so it bites
                report.loose.append(f"{_edit(node)} ({missing:.0e})")


def _edit(node: Node) -> str:
    names = [input_of(parameter).name for parameter in parameters_in(args_of(node)[0])]
    return ", ".join(names) or node.name


def count(report: Report, gm: GraphModule) -> None:
    """Multiply-accumulates of a smoothed graph, by what happens to them."""
    static = static_nodes(gm)
    described = set(linears(gm))
    for node in gm.graph.nodes:
        if node in described:
            report.macs += _of_linear(report, node)
        elif node.target in PRODUCTS and node not in static:
            report.macs += _of_product(report, node, static)


def _of_product(report: Report, node: Node, static: set[Node]) -> Macs:
    """A product that is no linear: of activations, of a batch of different matrices, or an outer product."""
    left, right = (args_of(node)[position] for position in PRODUCTS[node.target])
    parameters = [p for side in (left, right) if side in static for p in parameters_in(side)]
    inner = shape_of(left)[-1]
    if not parameters or inner == 1:
        return Macs()
    macs = float(torch.Size(shape_of(node)).numel()) * inner
    if max(shape_of(side)[0] for side in (left, right) if side in static and len(shape_of(side)) == 3) > 1:
        return Macs(experts=macs)
    report.kept[node.name] = f"{node.target} of {[input_of(p).name for p in parameters]}"
    return Macs(kept=macs)


def _of_linear(report: Report, node: Node) -> Macs:
    info, macs = info_of(node), float(torch.Size(shape_of(node)).numel()) * shape_of(args_of(node)[1])[-1]
    if not info.quantize:
        if "ignore pattern" in info.reason:
            return Macs(head=macs)
        if "picked" in info.reason:
            return Macs(routers=macs)
        report.kept[info.name] = info.reason
        return Macs(kept=macs)
    smoothing = node.meta["smoothing"]
    report.linears[info.name] = smoothing.reason
    share = macs / smoothing.channels
    return Macs(quantized=macs, folded=share * smoothing.folded, absorbed=share * smoothing.absorbed)


def _measure_quantized(report: Report, subject: Captured, known: dict[Any, Tensor], expected: list[Tensor]) -> None:
    for field, config in (("w8a8", Config(alpha=0.5, calibrate=1)), ("plain", Config())):
        gm, _ = passes.quantizing(config).run(subject.graph)
        error = relative_error(outputs(gm, subject, known)[0], expected[0])
        setattr(report, field, max(getattr(report, field), error))
    try:
        graph = CompiledGraph.of(Session(Config(inner="eager")), copy_graph(subject.graph))
        torch.manual_seed(0)
        results = _floats(graph.call(inputs(subject.graph, subject, {})))
    except Exception as error:
        report.compiled = _line(error)
        return
    expected = outputs(passes.quantizing(Config()).run(subject.graph)[0], subject, {})
    report.compiled = f"{change([widened(value) for value in results], expected):.1e}"
