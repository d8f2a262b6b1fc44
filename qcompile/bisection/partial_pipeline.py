"""Run a model with the first passes of a pipeline only, or with some linears quantized only.

The model is traced once; every variant is made of that graph, and the compiled call runs whichever was chosen last, op
by op. What the passes put into a graph has definitions in PyTorch, so each prefix of a pipeline runs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import GraphModule

from qcompile import names, passes
from qcompile.backend import Session
from qcompile.capture import Boxed, capture, compiled_call, raising
from qcompile.config import Config
from qcompile.errors import CaptureError, ConfigError, QCompileError
from qcompile.lowering.inductor import compile_eager, decompositions
from qcompile.lowering.lower import lower
from qcompile.lowering.partition import partition
from qcompile.lowering.target import detect
from qcompile.pass_pipeline import Bound, Pass, PassResult, Pipeline, pass_text
from qcompile.passes.find_linears import FindLinears, info_of, linears
from qcompile.weights import Binding

LOWER = "lower"  # the step after the passes: kernels in place of the dialect
# Parameters up to which variants of linears run in the dialect's definitions, which are slow: lowering, which changes
# rounding only, would take longer.
SMALL = 20_000_000


@dataclasses.dataclass(frozen=True)
class QuantizeOnly:
    """Leave every linear in float that is not among `keep`."""

    keep: tuple[str, ...]
    name: ClassVar[str] = "quantize_only"
    stage: ClassVar[str] = "any"
    bound: ClassVar[Bound] = "exact"

    def run(self, gm: GraphModule) -> PassResult:
        """Changes what find_linears decided; later passes read nothing else."""
        left = [node for node in linears(gm) if info_of(node).quantize and info_of(node).name not in self.keep]
        for node in left:
            node.meta["linear"] = dataclasses.replace(info_of(node), quantize=False, reason="it is not being tried")
        return PassResult(len(left))


class PartialPipeline:
    """A float model as a subject of bisection. The last step is the lowering."""

    def __init__(self, model: nn.Module, pipeline: Pipeline | None, options: dict[str, Any]) -> None:
        config = Config.from_options({**options, "inner": "eager"})
        if config.calibrate:
            raise ConfigError("bisect takes a calibration that is there; got calibrate; record it: qcompile.calibrate")
        self.model = names.original(model)
        self._session = Session(config)
        self._passes = (passes.quantizing(config) if pipeline is None else pipeline).passes
        self.steps = [*((pass_text(step), step.bound == "exact") for step in self._passes), (LOWER, True)]
        self._lowers = sum(parameter.numel() for parameter in self.model.parameters()) > SMALL
        self._graphs: list[GraphModule] = []
        self._variant: tuple[Any, Boxed] | None = None
        names.register(self.model)
        self._call = compiled_call(self.model, self._backend, dynamic=False)

    @functools.cached_property
    def linears(self) -> Sequence[str]:
        """Names of the linears that the passes would quantize, in graph order."""
        found = self._find_linears()
        if found is None:
            return ()
        gm, _ = Pipeline(self._passes[: found + 1]).run(self._graph())
        quantized = dict.fromkeys(info_of(node).name for node in linears(gm) if info_of(node).quantize)
        if not quantized:
            raise ConfigError(
                f"no linear of {type(self.model).__name__} would be quantized; qcompile explain says why not"
            )
        return tuple(quantized)

    def run_first(self, steps: int, arguments: dict[str, Any]) -> Any:
        """Call the model with the first `steps` steps done."""
        chosen = self._passes[:steps]
        return self._run(("first", steps), chosen, steps > len(self._passes), arguments)

    def run_only(self, linears: Sequence[str] | None, arguments: dict[str, Any]) -> Any:
        """Call the model with everything done, for these linears only. A small model is not lowered."""
        found = self._find_linears()
        if linears is None or found is None:
            return self.run_first(len(self._passes) + self._lowers, arguments)
        chosen = (*self._passes[: found + 1], QuantizeOnly(tuple(linears)), *self._passes[found + 1 :])
        return self._run(("only", frozenset(linears)), chosen, self._lowers, arguments)

    def _find_linears(self) -> int | None:
        """Where in the pipeline linears are found."""
        return next((i for i, step in enumerate(self._passes) if isinstance(step, FindLinears)), None)

    def _graph(self) -> GraphModule:
        if len(self._graphs) != 1:
            raise CaptureError(
                f"bisect needs the model in one graph; {type(self.model).__name__} gave {len(self._graphs)}; "
                "qcompile.explain says what became of each linear"
            )
        return self._graphs[0]

    def _run(self, key: Any, chosen: tuple[Pass, ...], lowered: bool, arguments: dict[str, Any]) -> Any:
        if self._variant is None or self._variant[0] != key:
            self._variant = key, self._lazily(chosen, lowered)
        return self._call(**arguments)

    def _backend(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            return capture(gm, example_inputs, self._keep)
        except QCompileError as error:
            return raising(error)

    def _keep(self, traced: GraphModule) -> Boxed:
        self._graphs.append(traced)

        def call(args: list[Any]) -> Any:
            self._graph()  # raises at the second graph, which is traced when the first has run
            assert self._variant is not None
            return self._variant[1](args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def _lazily(self, chosen: tuple[Pass, ...], lowered: bool) -> Boxed:
        """The variant, made at its first call, when the graph is there and the parameters are known."""
        made: list[Boxed] = []

        def call(args: list[Any]) -> Any:
            if not made:
                made.append(self._made(chosen, lowered, args))
            return made[0](args)

        return call

    def _made(self, chosen: tuple[Pass, ...], lowered: bool, args: list[Any]) -> Boxed:
        gm, _ = Pipeline(chosen).run(self._graph())
        if lowered:
            device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
            gm, _ = lower(gm, detect(device), decompositions())
        parts = partition(gm)
        binding = Binding(parts, [args[index] for index in parts.parameters], self._session.statistic, args)
        run = compile_eager(parts.run)

        def call(args: list[Any]) -> Any:
            return run([*(args[index] for index in parts.run_inputs), *binding.values])

        return call
