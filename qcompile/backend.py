"""The torch.compile backend: capture → passes → lowering → callable."""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from qcompile import debug, names, ops, passes
from qcompile.calibration import Field, Recorder
from qcompile.capture import capture, raising
from qcompile.config import Config
from qcompile.errors import CalibrationError, ConfigError, LoweringError, QCompileError
from qcompile.lowering.expand_kernels import expand_kernels
from qcompile.lowering.inductor import compile_eager, compile_inductor, decompositions
from qcompile.lowering.lower import lower
from qcompile.lowering.outline import outline
from qcompile.lowering.partition import partition
from qcompile.lowering.select import check_dtype
from qcompile.lowering.target import detect
from qcompile.lowering.tiles import load_measured
from qcompile.memory import uncollected
from qcompile.observing import observe
from qcompile.pass_pipeline import Observer, Pipeline
from qcompile.passes.find_linears import info_of, linears, matches
from qcompile.rewrite import Refusal, copy_graph, fake_mode_of, input_of
from qcompile.validate import Validate
from qcompile.weights import Binding


@dataclasses.dataclass(eq=False)
class Session:
    """One set of options at work, shared by its graphs. `observe_only` never quantizes (qcompile.calibrate)."""

    config: Config
    observe_only: bool = False
    recorder: Recorder = dataclasses.field(default_factory=Recorder)

    def backend(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one of Dynamo's graphs; user mistakes become a callable that raises one line."""
        try:
            with uncollected():
                return capture(gm, example_inputs, self._build)
        except QCompileError as error:
            return raising(error)

    def _build(self, traced: GraphModule) -> Callable[[list[Any]], Any]:
        return (CompiledGraph if traced.meta["whole_model"] else CompiledByName)(self, traced).call

    def statistic(self, weight: Tensor, name: str, field: Field) -> Tensor:
        """What is known of the activations that meet a weight. Raises CalibrationError."""
        source = self.config.calibration or self.recorder
        found = source.statistic(weight, name, field)
        if self.config.activations == "static" and field == "absmax" and not bool(found.any()):
            raise CalibrationError(
                f"static activations need a range; calibration saw only zeros at {name}; calibrate with data that "
                "reaches it, or ignore it"
            )
        return found


@functools.lru_cache(maxsize=256)
def session_for(config: Config) -> Session:
    """Graphs compiled with equal options share a session, as Dynamo shares compiled code between them."""
    return Session(config)


def w8a8(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend behind `torch.compile(model, backend="w8a8", options=…)`; options are the fields of Config."""
    try:
        config = debug.with_environment(Config.from_options(options, mode))
    except QCompileError as error:
        return raising(error)
    return session_for(config).backend(gm, example_inputs)


class CompiledGraph:
    """One captured graph in its stages, and the callable that Dynamo gets. late: built at run time, when Dynamo
    takes no more guards."""

    def __init__(self, session: Session, traced: GraphModule, *, late: bool = False) -> None:
        self.session, self.config, self._late = session, session.config, late
        self.refusals: tuple[Refusal, ...] = ()
        self._bindings: dict[tuple[int, ...], Binding] = {}
        self._validate = Validate() if self.config.verify else None
        if _device(traced).type == "meta":
            raise LoweringError("a model must hold weights to run; this one is on the meta device; load them first")
        if session.observe_only or self.config.calibrate:
            self.observed, self.refusals = self._run_passes(passes.observing(self.config), traced)
        if not session.observe_only:
            self.quantized, self.refusals = self._run_passes(passes.quantizing(self.config), traced)
            _check_coverage(self.quantized, traced, self.refusals)
            self._lower(self.quantized)

    def _run_passes(self, pipeline: Pipeline, traced: GraphModule) -> tuple[GraphModule, tuple[Refusal, ...]]:
        watching: list[Observer] = [*debug.observers(self.config, pipeline)]
        if self._validate is not None:
            watching.append(self._validate)
        return pipeline.run(traced, watching)

    def _lower(self, quantized: GraphModule) -> None:
        target = detect(_device(quantized))
        check_dtype(target, self.config.torch_dtype)
        guards = _guards(quantized)
        measured = load_measured(self.config.tiles, target) if self.config.tiles else None
        lowered, self.kernels = lower(quantized, target, decompositions(), measured)
        self.partition = partition(lowered)
        run = self.partition.run
        if self.config.inner == "eager":
            self._run = compile_eager(run)
        else:
            opened = expand_kernels(run, decompositions())
            if target.kind == "cpu":  # CUDA graphs have to see every write
                opened = outline(opened)
            self._run = compile_inductor(opened, _static_positions(run), self.config.mode)
        if self._late and _guards(quantized) != guards:
            # Dynamo checks the guards it knew when it compiled. Code that assumes more about sizes must not run; the
            # dialect's own definitions, op by op, assume nothing.
            self.partition = partition(quantized)
            self._run = compile_eager(self.partition.run)
        self._leaves = self.partition.parameters

    def call(self, args: list[Any]) -> Any:
        """Run on the captured graph's arguments; takes ownership of the list, as Inductor's functions do."""
        if self._calibrating(args):
            return observe(self.observed, args, self.session.recorder)
        binding = self._bind(args)
        if self._validate is not None:
            self._validate.check(args, self.session.statistic)
            self._validate = None
        inputs = [args[index] for index in self.partition.run_inputs]
        inputs += binding.values
        args.clear()
        return self._run(inputs)

    call._boxed_call = True  # type: ignore[attr-defined]

    def _calibrating(self, args: list[Any]) -> bool:
        if self.session.observe_only:
            return True
        if not self.config.calibrate:
            return False
        weights = [args[index] for indices in self.observed.meta["observed"] for index in indices]
        recorded = min((self.session.recorder.calls(weight) for weight in weights), default=self.config.calibrate)
        return recorded < self.config.calibrate

    def _bind(self, args: list[Any]) -> Binding:
        parameters = [args[index] for index in self._leaves]
        # A graph that Dynamo reuses for several layers meets several sets of weights, so there may be many.
        key = tuple(map(id, parameters))
        binding = self._bindings.get(key)
        if binding is None or not binding.fits(parameters):
            binding = Binding(self.partition, parameters, self.session.statistic, args)
            self._bindings = {k: kept for k, kept in self._bindings.items() if kept.alive()}
            self._bindings[key] = binding
        return binding


class CompiledByName:
    """A traced part of a model, compiled once per outcome of the ignore patterns.

    Dynamo reuses a graph for every layer that looks like the first, whatever its name; a pattern such as "layers.0.*"
    tells those layers apart.
    """

    def __init__(self, session: Session, traced: GraphModule) -> None:
        self._session, self._traced = session, traced
        records = [input_of(node) for node in traced.graph.find_nodes(op="placeholder")]
        self._parameters = [record for record in records if record.kind == "parameter"]
        first = CompiledGraph(session, traced)
        self._compiled = {self._ignored([record.names for record in self._parameters]): first}
        self._known: dict[tuple[int, ...], tuple[list[weakref.ref[Tensor]], CompiledGraph]] = {}

    def call(self, args: list[Any]) -> Any:
        """Run the graph compiled for the names that these parameters have."""
        parameters = [args[record.index] for record in self._parameters]
        references, graph = self._known.get(tuple(map(id, parameters)), ((), None))
        if graph is None or any(r() is not p for r, p in zip(references, parameters, strict=True)):
            graph = self._graph_for(parameters)
            self._known = {k: kept for k, kept in self._known.items() if all(r() is not None for r in kept[0])}
            self._known[tuple(map(id, parameters))] = [weakref.ref(p) for p in parameters], graph
        return graph.call(args)

    call._boxed_call = True  # type: ignore[attr-defined]

    def _graph_for(self, parameters: list[Tensor]) -> CompiledGraph:
        model = names.calling_model()
        if model is not None and any(names.name_of(parameter) is None for parameter in parameters):
            names.register(model)
        live = [names.names_of(p) or record.names for p, record in zip(parameters, self._parameters, strict=True)]
        outcome = self._ignored(live)
        if outcome not in self._compiled:
            renamed = copy_graph(self._traced)
            by_index = {record.index: found for record, found in zip(self._parameters, live, strict=True)}
            for node in renamed.graph.find_nodes(op="placeholder"):
                record = input_of(node)
                name, *aliases = by_index.get(record.index, record.names)
                node.meta["input"] = dataclasses.replace(record, name=name, aliases=tuple(aliases))
            self._compiled[outcome] = CompiledGraph(self._session, renamed, late=True)
        return self._compiled[outcome]

    def _ignored(self, parameters: Sequence[tuple[str, ...]]) -> tuple[bool, ...]:
        ignore = self._session.config.ignore
        return tuple(any(matches(names.module_name(name), ignore) for name in found) for found in parameters)


def _guards(gm: GraphModule) -> int:
    """How many facts about symbolic sizes have been assumed so far."""
    shape_env = fake_mode_of(gm).shape_env
    return len(shape_env.guards) if shape_env is not None else 0


def _static_positions(run: GraphModule) -> list[int]:
    """Inputs that stay where they are from call to call: parameters, prepared tensors, static caches."""
    positions = []
    for position, node in enumerate(run.graph.find_nodes(op="placeholder")):
        record = node.meta.get("input")
        if record is None or record.kind != "activation" or record.fixed:
            positions.append(position)
    return positions


def _device(gm: GraphModule) -> torch.device:
    values = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    devices = [value.device for value in values if isinstance(value, Tensor)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _check_coverage(quantized: GraphModule, traced: GraphModule, refusals: Sequence[Refusal]) -> None:
    """A whole model in which nothing was quantized is a mistake; one graph of a broken-up model may be like that."""
    if any(node.target is ops.scaled_mm for node in quantized.graph.nodes):
        return
    if not traced.meta.get("whole_model"):
        return
    left = {info_of(node).name: info_of(node).reason for node in linears(quantized)}
    if left:
        name, reason = next(iter(left.items()))
        raise ConfigError(f"no linear is left to quantize: {len(left)} stay in float, {name} because {reason}")
    if refusals:
        raise ConfigError(f"no linear is left to quantize: {refusals[0].reason}")
    raise ConfigError("the model has no linear layers; w8a8 has nothing to quantize; compile it with Inductor")
