"""Passes are values; a pipeline is a tuple of them that prints and parses as text."""

import ast
import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol

from torch.fx import GraphModule

from qcompile.errors import ConfigError, PassError, QCompileError
from qcompile.rewrite import Refusal, copy_graph

Bound = Literal["exact", "quantization"]
STRING_OR_BRACE = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[{}]""")


@dataclasses.dataclass(frozen=True)
class PassResult:
    """What a pass did: how many edits, and a reason for everything it looked at and left alone."""

    changes: int
    refusals: tuple[Refusal, ...] = ()


class Pass(Protocol):
    """A frozen dataclass with a name; its fields are its options.

    `run` edits a graph in place: valid in, valid out. `bound` is what translation validation holds it to: "exact"
    means equal up to float rounding, "quantization" the analytic bound from the scales.
    """

    name: ClassVar[str]
    stage: ClassVar[str]
    bound: ClassVar[Bound]

    def run(self, gm: GraphModule) -> PassResult: ...


@dataclasses.dataclass(frozen=True)
class Taken:
    """One pass as it ran. index: its place in the pipeline. before: a copy of the graph it was given, None unless an
    observer compares. after: the graph itself, which later passes go on with. seconds: of the pass alone."""

    index: int
    step: Pass
    before: GraphModule | None
    after: GraphModule
    result: PassResult
    seconds: float


class Observer(Protocol):
    """Looks at every step of a pipeline run. Passes themselves never print, time or check anything.

    compares: whether `step` wants the graph before the pass, which costs a copy.
    """

    compares: bool

    def start(self, gm: GraphModule) -> None: ...

    def step(self, taken: Taken) -> None: ...


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Passes in order. `run` works on a copy, and shows each step to the observers."""

    passes: tuple[Pass, ...]

    def run(self, gm: GraphModule, observers: Sequence[Observer] = ()) -> tuple[GraphModule, tuple[Refusal, ...]]:
        """Returns the rewritten graph and every refusal. Raises PassError naming the pass that failed."""
        current = copy_graph(gm)
        refusals: list[Refusal] = []
        compares = any(observer.compares for observer in observers)
        for observer in observers:
            observer.start(current)
        for index, step in enumerate(self.passes):
            before = copy_graph(current) if compares else None
            started = time.perf_counter()
            result = _run_pass(step, current)
            taken = Taken(index, step, before, current, result, time.perf_counter() - started)
            refusals.extend(result.refusals)
            for observer in observers:
                observer.step(taken)
        current.recompile()
        return current, tuple(refusals)

    def to_text(self) -> str:
        """ "canonicalize,smooth{alpha=0.5}": every option that differs from its default."""
        return ",".join(pass_text(step) for step in self.passes)

    @classmethod
    def from_text(cls, text: str, known: Sequence[type[Any]]) -> "Pipeline":
        """Parse what `to_text` printed, with `known` pass classes. Raises ConfigError."""
        classes = {kind.name: kind for kind in known}
        return cls(tuple(_parse_pass(call, classes) for call in _calls(text)))


def _run_pass(step: Pass, gm: GraphModule) -> PassResult:
    try:
        return step.run(gm)
    except QCompileError:
        raise
    except Exception as error:
        raise PassError(f"pass {pass_text(step)} failed: {type(error).__name__}: {error}") from error


def pass_text(step: Pass) -> str:
    """One pass with the options that differ from their defaults, as `Pipeline.from_text` reads it."""
    fields = dataclasses.fields(step)  # type: ignore[arg-type]
    options = [(f.name, getattr(step, f.name)) for f in fields if getattr(step, f.name) != f.default]
    inside = ",".join(f"{name}={_value_text(value)}" for name, value in options)
    return f"{step.name}{{{inside}}}" if inside else step.name


def _value_text(value: object) -> str:
    return value if isinstance(value, str) and value.isidentifier() else repr(value)


def _calls(text: str) -> list[ast.expr]:
    braces = {"{": "(", "}": ")"}
    source = "[" + STRING_OR_BRACE.sub(lambda match: braces.get(match[0], match[0]), text) + "]"
    try:
        parsed: ast.expr | None = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError):
        parsed = None
    if not isinstance(parsed, ast.List) or any(isinstance(call, ast.Call) and call.args for call in parsed.elts):
        raise ConfigError(f"a pipeline reads like canonicalize,smooth{{alpha=0.5}}; got {text!r}")
    return parsed.elts


def _parse_pass(call: ast.expr, classes: dict[str, type[Any]]) -> Pass:
    name_node = call.func if isinstance(call, ast.Call) else call
    name = name_node.id if isinstance(name_node, ast.Name) else ast.unparse(name_node)
    if name not in classes:
        raise ConfigError(f"unknown pass {name!r}; the passes are {', '.join(classes)}")
    keywords = call.keywords if isinstance(call, ast.Call) else []
    options = {keyword.arg or "": _parse_value(keyword.value) for keyword in keywords}
    fields = {field.name for field in dataclasses.fields(classes[name])}
    for option in options:
        if option not in fields:
            allowed = ", ".join(sorted(fields)) or "none"
            raise ConfigError(f"unknown option {option!r} for pass {name}; its options are: {allowed}")
    step: Pass = classes[name](**options)
    return step


def _parse_value(value: ast.expr) -> object:
    if isinstance(value, ast.Name):
        return value.id
    try:
        return ast.literal_eval(value)
    except ValueError:
        raise ConfigError(f"a pass option must be a literal; got {ast.unparse(value)!r}") from None
