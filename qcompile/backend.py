"""The torch.compile backend: capture → passes → lowering → callable."""

import dataclasses
import functools
import logging
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import GraphModule

from qcompile import debug, names
from qcompile.calibration import Field, Recorder, statistic_for
from qcompile.capture import look, raising, trace, without_trace
from qcompile.captured import named_after
from qcompile.config import Config
from qcompile.errors import QCompileError
from qcompile.lowering.compute_once import compute_once
from qcompile.lowering.expand_kernels import expand_kernels, with_workspace
from qcompile.lowering.inductor import compile_eager, compile_inductor, decompositions
from qcompile.lowering.merge_counters import merge_counters
from qcompile.lowering.outline import outline
from qcompile.lowering.partition import partition
from qcompile.lowering.select import passed_over
from qcompile.lowering.target import Target, detect
from qcompile.memory import uncollected
from qcompile.observing import observe
from qcompile.passes.find_linears import known_as, matches
from qcompile.rewrite import Input, input_of
from qcompile.saved_graph import cache
from qcompile.saved_graph.key import NoKey, key_of
from qcompile.stages import Stages, device_of, first_device, guards_of, tiles_of, to_stages
from qcompile.validate import Validate
from qcompile.weights import Binding

log = logging.getLogger(__name__)


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
                inputs, facts = look(gm, example_inputs)
                key = self._key(gm, example_inputs, inputs, facts)
                fake_mode = detect_fake_mode(list(example_inputs))
                stages = cache.load(key, fake_mode) if key and fake_mode else None
                if stages is not None and stages.around is not None:
                    return without_trace(CompiledGraph(self, stages).call, stages.around)
                return trace(gm, example_inputs, inputs, functools.partial(self._build, key), **facts)
        except QCompileError as error:
            return raising(error)

    def _build(self, key: str | None, traced: GraphModule) -> Callable[[list[Any]], Any]:
        if not traced.meta["whole_model"]:
            return CompiledByName(self, traced).call
        return CompiledGraph.of(self, traced, key).call

    def _key(
        self, gm: GraphModule, example_inputs: Sequence[Any], inputs: Sequence[Input], facts: Mapping[str, bool]
    ) -> str | None:
        """Under which a compiled graph is kept for later processes; None if it is not."""
        watched = self.observe_only or self.config.verify or self.config.dump or debug.switches()
        if watched or not facts["whole_model"] or not cache.enabled():
            return None
        settings = _settings(self.config, detect(first_device(example_inputs)))
        try:
            return key_of(gm, example_inputs, inputs, facts, settings)
        except NoKey as reason:
            log.info("a compiled graph is not kept: it %s", reason)
        except Exception as error:  # a cache must not break a model
            log.warning("a compiled graph is not kept: %s: %s", type(error).__name__, error)
        return None

    def statistic(self, weight: Tensor, name: str, field: Field) -> Tensor:
        """What is known of the activations that meet a weight. Raises CalibrationError."""
        source = self.config.calibration or self.recorder
        return statistic_for(source, self.config.activations, weight, name, field)


# Graphs keep their session; with the last of them goes what it has recorded, or the calibration it was given.
_sessions: weakref.WeakValueDictionary[Config, Session] = weakref.WeakValueDictionary()


def session_for(config: Config) -> Session:
    """Graphs compiled with equal options share a session, as Dynamo shares compiled code between them."""
    return _sessions.setdefault(config, Session(config))


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
    """A graph in its stages, and the callable that Dynamo gets. late: built at run time, when Dynamo takes no more
    guards."""

    def __init__(
        self, session: Session, stages: Stages, *, validate: Validate | None = None, late: bool = False
    ) -> None:
        self.session, self.config, self.stages = session, session.config, stages
        self._validate = validate
        self._binding: Binding | None = None  # of the last call
        self._bindings: dict[tuple[int, ...], Binding] = {}
        if stages.partition is not None:
            self.partition = stages.partition
            self._run = _compile(stages.partition.run, self.config)
            if late and stages.quantized is not None and guards_of(stages.quantized) != stages.guards:
                # Dynamo checks the guards it knew when it compiled. Code that assumes more about sizes must not run;
                # the dialect's own definitions, op by op, assume nothing.
                self.partition = partition(stages.quantized)
                self._run = compile_eager(self.partition.run)
            self._parameters = _picker(self.partition.parameters)
            self._run_inputs = _picker(self.partition.run_inputs)

    @classmethod
    def of(
        cls, session: Session, traced: GraphModule, key: str | None = None, *, late: bool = False
    ) -> "CompiledGraph":
        """From a captured graph, whose stages are kept under the key."""
        validate = Validate() if session.config.verify else None
        stages = to_stages(session.config, traced, observe_only=session.observe_only, validate=validate)
        if key is not None:
            cache.save(key, stages)  # before compiling, which edits graphs
        return cls(session, stages, validate=validate, late=late)

    def call(self, args: list[Any]) -> Any:
        """Run on the captured graph's arguments; takes ownership of the list, as Inductor's functions do."""
        if self._calibrating(args):
            assert self.stages.observed is not None
            return observe(self.stages.observed, args, self.session.recorder)
        binding = self._bind(args)
        if self._validate is not None:
            self._validate.check(args, self.session.statistic)
            self._validate = None
        inputs = [*self._run_inputs(args), *binding.values]
        args.clear()
        return self._run(inputs)

    call._boxed_call = True  # type: ignore[attr-defined]

    def _calibrating(self, args: list[Any]) -> bool:
        if self.session.observe_only:
            return True
        if not self.config.calibrate or self.stages.observed is None:
            return False
        weights = [args[index] for indices in self.stages.observed.meta["observed"] for index in indices]
        recorded = min((self.session.recorder.calls(weight) for weight in weights), default=self.config.calibrate)
        return recorded < self.config.calibrate

    def _bind(self, args: list[Any]) -> Binding:
        parameters = self._parameters(args)
        binding = self._binding  # another thread may put its own in place meanwhile
        if binding is None or not binding.fits(parameters):
            binding = self._binding = self._another_binding(parameters, args)
        return binding

    def _another_binding(self, parameters: Sequence[Tensor], args: list[Any]) -> Binding:
        # A graph that Dynamo reuses for several layers meets several sets of weights, so there may be many.
        key = tuple(map(id, parameters))
        binding = self._bindings.get(key)
        if binding is None or not binding.fits(parameters):
            binding = Binding(self.partition, parameters, self.session.statistic, args)
            self._bindings = {k: kept for k, kept in self._bindings.items() if kept.alive()}
            self._bindings[key] = binding
        return binding


def _picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What picks these of a call's arguments."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda arguments: [arguments[index] for index in indices]


class CompiledByName:
    """A traced part of a model, compiled once per outcome of the ignore patterns.

    Dynamo reuses a graph for every layer that looks like the first, whatever its name; a pattern such as "layers.0.*"
    tells those layers apart.
    """

    def __init__(self, session: Session, traced: GraphModule) -> None:
        self._session, self._traced = session, traced
        self._parameters = [record.index for record in _parameters_of(traced)]
        self._compiled = {self._ignored(traced): CompiledGraph.of(session, traced)}
        self._known: dict[tuple[int, ...], tuple[list[weakref.ref[Tensor]], CompiledGraph]] = {}

    def call(self, args: list[Any]) -> Any:
        """Run the graph compiled for the names that these parameters have."""
        parameters = [args[index] for index in self._parameters]
        references, graph = self._known.get(tuple(map(id, parameters)), ((), None))
        if graph is None or any(r() is not p for r, p in zip(references, parameters, strict=True)):
            graph = self._graph_for(args)
            self._known = {k: kept for k, kept in self._known.items() if all(r() is not None for r in kept[0])}
            self._known[tuple(map(id, parameters))] = [weakref.ref(p) for p in parameters], graph
        return graph.call(args)

    call._boxed_call = True  # type: ignore[attr-defined]

    def _graph_for(self, args: list[Any]) -> CompiledGraph:
        model = names.calling_model()
        if model is not None and any(names.name_of(args[index]) is None for index in self._parameters):
            names.register(model)
        renamed = named_after(self._traced, args)
        outcome = self._ignored(renamed)
        if outcome not in self._compiled:
            self._compiled[outcome] = CompiledGraph.of(self._session, renamed, late=True)
        return self._compiled[outcome]

    def _ignored(self, gm: GraphModule) -> tuple[bool, ...]:
        ignore = self._session.config.ignore
        found = [record.names for record in _parameters_of(gm)]
        return tuple(any(matches(one, ignore) for name in all_names for one in known_as(name)) for all_names in found)


def _parameters_of(gm: GraphModule) -> list[Input]:
    records = map(input_of, gm.graph.find_nodes(op="placeholder"))
    return [record for record in records if record.kind == "parameter"]


def _compile(run: GraphModule, config: Config) -> Callable[[list[Any]], Any]:
    if config.inner == "eager":
        return compile_eager(run)
    positions = _static_positions(run)
    ready = for_inductor(run)
    compiled = compile_inductor(ready, positions, config.mode)
    return with_workspace(compiled) if ready.meta.get("tma") else compiled


def for_inductor(run: GraphModule) -> GraphModule:
    """A lowered graph as Inductor gets it."""
    if device_of(run).type == "cpu":
        return outline(expand_kernels(run, decompositions()))
    # Not outlined: a repeated layer writes to its caches, and CUDA graphs have to see every write.
    return merge_counters(expand_kernels(compute_once(run), decompositions()))


def _settings(config: Config, target: Target) -> list[object]:
    """What decides, beside a graph, what it is lowered to."""
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    options["calibration"] = config.calibrated  # its values enter at run time
    return [options, str(target), target.name, target.processors, tiles_of(config, target), passed_over(target)]


def _static_positions(run: GraphModule) -> list[int]:
    """Inputs that stay where they are from call to call: parameters, prepared tensors, static caches."""
    positions = []
    for position, node in enumerate(run.graph.find_nodes(op="placeholder")):
        record = node.meta.get("input")
        if record is None or record.kind != "activation" or record.fixed:
            positions.append(position)
    return positions
