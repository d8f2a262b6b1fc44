"""Graphs as stable text: one line per node with types, module names and the pass that made it."""

import contextlib
import dataclasses
import difflib
import operator
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qcompile.errors import ConfigError
from qcompile.pass_pipeline import Pass, PassResult, Taken, pass_text
from qcompile.passes.find_linears import LINEARS
from qcompile.rewrite import input_of, module_of

SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "b8",
    torch.float8_e4m3fn: "f8e4m3", torch.float8_e5m2: "f8e5m2",
}  # fmt: skip


def graph_text(gm: GraphModule) -> str:
    """The whole graph, one line per node. The same graph always gives the same text."""
    return "\n".join(map(node_text, gm.graph.nodes)) + "\n"


def node_text(node: Node) -> str:
    """A node's line: name, type, call, and where it comes from."""
    if node.op == "placeholder":
        record = node.meta.get("input")
        note = f"{record.kind} {record.name}" if record else ""
        return _with_note(f"{node.name}: {type_text(node.meta.get('val'))} = input", note)
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    if node.op == "get_attr":
        return _with_note(f"{node.name}: {type_text(node.meta.get('val'))} = constant", _note(node))
    args = ", ".join([*map(_argument, node.args), *(f"{k}={_argument(v)}" for k, v in node.kwargs.items())])
    call = f"{target_text(node.target)}({args})"
    return _with_note(f"{node.name}: {type_text(node.meta.get('val'))} = {call}", _note(node))


def _with_note(line: str, note: str) -> str:
    return f"{line}  # {note}" if note else line


def _note(node: Node) -> str:
    origin = node.meta.get("origin")
    parts = [f"{origin.by} ← {origin.of}" if origin else "", module_of(node), _linear_note(node)]
    return "  ".join(part for part in parts if part)


def _linear_note(node: Node) -> str:
    info = node.meta.get("linear")
    if info is None or node.target not in LINEARS:
        return ""
    return f"group {info.group}" + (f" after norm {info.norm}" if info.norm else "")


def type_text(value: Any) -> str:
    """f32[2, s0, 64] for a tensor, a list of those for a tuple."""
    if isinstance(value, torch.Tensor):
        return f"{SHORT.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(type_text, value))})"
    return type(value).__name__


def target_text(target: Any) -> str:
    """A call's target as dumps name it."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name.removesuffix(".default")
    if target is operator.getitem:
        return "getitem"
    return getattr(target, "__name__", str(target))


def _argument(value: Any) -> str:
    if isinstance(value, Node):
        return value.name
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_argument, value))}]"
    if isinstance(value, torch.dtype):
        return SHORT.get(value, str(value))
    return repr(value)


def check_folder(folder: Path) -> None:
    """Make the folder that dumps go to. Raises ConfigError if nothing can be written there."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=folder).cleanup()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"{folder}: {error.strerror}"
        raise ConfigError(f"dumps need a folder that can be written; {reason}; choose another") from None


@dataclasses.dataclass
class DumpTo:
    """Writes NN.pass.before.py, .after.py and .diff for every pass into a numbered subfolder per graph. Raises
    ConfigError if it cannot.

    A graph is put into words once: what one pass leaves is what the next one gets.
    """

    folder: Path
    pipeline: str
    compares: bool = dataclasses.field(default=False, init=False)

    def start(self, gm: GraphModule) -> None:
        parameters = sum(input_of(node).kind == "parameter" for node in gm.graph.find_nodes(op="placeholder"))
        check_folder(self.folder)
        taken = [int(p.name.split("-")[1]) for p in self.folder.glob("graph-*") if p.name.split("-")[1].isdigit()]
        self._graph = self.folder / f"graph-{max(taken, default=-1) + 1:03d}"
        with _writing(self.folder):
            self._graph.mkdir()
        self._title = f"{len(gm.graph.nodes)} nodes, {parameters} parameters"
        self._text = graph_text(gm)

    def step(self, taken: Taken) -> None:
        stem = f"{taken.index:02d}.{taken.step.name}"
        old, new = self._text, graph_text(taken.after)
        self._text = new
        header = self._header(taken.step, taken.result)
        with _writing(self.folder):
            for suffix, text in (("before.py", old), ("after.py", new), ("diff", _diff(old, new))):
                (self._graph / f"{stem}.{suffix}").write_text(header + text, encoding="utf-8")

    def _header(self, step: Pass, result: PassResult) -> str:
        lines = [
            f"reproduce: QCOMPILE_DEBUG=dump {shlex.join(_command())}",
            f"pass: {pass_text(step)}  ({result.changes} edits)",
            f"pipeline: {self.pipeline}",
            f"graph: {self._title}",
            *(f"refused: {refusal.node}: {refusal.reason}" for refusal in result.refusals),
        ]
        return "".join(f"# {line}\n" for line in lines)


def _diff(old: str, new: str) -> str:
    """A unified diff; an empty line if nothing changed."""
    if old == new:
        return "\n"
    return "\n".join(difflib.unified_diff(old.splitlines(), new.splitlines(), "before", "after", lineterm="")) + "\n"


def _command() -> list[str]:
    return ["python", *(sys.argv if sys.argv and sys.argv[0] not in ("", "-c") else ["…"])]
