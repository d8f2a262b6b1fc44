"""What a pipeline did to a graph, as data: every pass, and the graphs between them line by line.

A line that several graphs have is kept once. Graphs are compared by node names, which passes leave alone, so that a
node that changed stands beside what it was.
"""

import bisect
import inspect
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qcompile.dump import node_text
from qcompile.pass_pipeline import Pass, Taken, pass_text

FRAME = re.compile(r'File "(.+)", line (\d+), in .*\n\s*(.*)')
TORCH = PurePath(torch.__file__).parent.as_posix()
SHOWN_REFUSALS = 1000


class Steps:
    """Observer that keeps every step of one run."""

    compares = True

    def __init__(self) -> None:
        self.taken: list[Taken] = []

    def start(self, gm: GraphModule) -> None:
        self.taken.clear()

    def step(self, taken: Taken) -> None:
        self.taken.append(taken)

    def graphs(self, final: GraphModule) -> list[GraphModule]:
        """The captured graph, then the graph after each pass; `final` is what the run returned."""
        return [*map(self.before, range(len(self.taken))), final]

    def before(self, index: int) -> GraphModule:
        """The graph that a step was given."""
        graph = self.taken[index].before
        assert graph is not None
        return graph


class Lines:
    """Every different line of a set of graphs. lines: text and index into sources, −1 for none. sources: file, line
    number and code that nodes were traced from."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int]] = []
        self.sources: list[str] = []
        self._line_index: dict[tuple[str, int], int] = {}
        self._source_index: dict[str, int] = {}

    def of(self, gm: GraphModule) -> list[int]:
        """A graph as indices of its lines, one per node."""
        return [self._line(node) for node in gm.graph.nodes]

    def _line(self, node: Node) -> int:
        line = node_text(node), self._source(node)
        if line not in self._line_index:
            self._line_index[line] = len(self.lines)
            self.lines.append(line)
        return self._line_index[line]

    def _source(self, node: Node) -> int:
        source = source_of(node)
        if not source:
            return -1
        if source not in self._source_index:
            self._source_index[source] = len(self.sources)
            self.sources.append(source)
        return self._source_index[source]


def source_of(node: Node) -> str:
    """Where in the model's code a node was written, "package/file.py:12: code"; empty if capture did not record it."""
    frames = FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not PurePath(frame[0]).as_posix().startswith(TORCH)]
    if not own:
        return ""
    path, line, code = own[-1]
    return f"{_short(path)}:{line}: {code}"


def _short(path: str) -> str:
    """A path without what only this machine has."""
    _, installed, inside = PurePath(path).as_posix().rpartition("/site-packages/")
    return inside if installed else PurePath(path).name


def run_data(steps: Steps, final: GraphModule, checks: dict[str, dict[str, Any]], lines: Lines) -> dict[str, Any]:
    """One graph's way through the pipeline. checks: outcomes of translation validation by the text of the pass."""
    graphs = steps.graphs(final)
    names = [[node.name for node in gm.graph.nodes] for gm in graphs]
    texts = [lines.of(gm) for gm in graphs]
    passes = [
        {
            **_described(taken.step),
            "seconds": taken.seconds,
            "edits": taken.result.changes,
            "refusals": [(r.node, r.reason) for r in taken.result.refusals[:SHOWN_REFUSALS]],
            "refused": len(taken.result.refusals),
            "check": checks.get(pass_text(taken.step)),
            "blocks": changed_blocks(names[index], names[index + 1]),
        }
        for index, taken in enumerate(steps.taken)
    ]
    return {"nodes": len(names[0]), "passes": passes, "texts": texts}


def _described(step: Pass) -> dict[str, str]:
    doc = (inspect.getdoc(step) or "").partition("\n")[0]
    return {"name": step.name, "text": pass_text(step), "doc": doc, "stage": step.stage, "bound": step.bound}


def changed_blocks(before: Sequence[str], after: Sequence[str]) -> list[tuple[int, int, int, int]]:
    """Nodes before[a:b] that became after[c:d], as (a, b, c, d); between blocks both have the same names in order.

    Names are unique, so the longest common subsequence is the longest increasing run of places: n · log n, where
    comparing as text would take minutes for thousands of linears.
    """
    places = {name: place for place, name in enumerate(after)}
    common = [(i, places[name]) for i, name in enumerate(before) if name in places]
    blocks, a, c = [], 0, 0
    for b, d in [*_increasing(common), (len(before), len(after))]:
        if (a, c) != (b, d):
            blocks.append((a, b, c, d))
        a, c = b + 1, d + 1
    return blocks


def _increasing(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest run of pairs, not necessarily neighbours, whose second entries increase."""
    ends: list[int] = []  # the smallest second entry that a run of each length ends with
    index: list[int] = []
    previous: list[int] = []
    for i, (_, value) in enumerate(pairs):
        length = bisect.bisect_left(ends, value)
        ends[length : length + 1] = [value]
        index[length : length + 1] = [i]
        previous.append(index[length - 1] if length else -1)
    found, i = [], index[-1] if index else -1
    while i >= 0:
        found.append(pairs[i])
        i = previous[i]
    return found[::-1]
