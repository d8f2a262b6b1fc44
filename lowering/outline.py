"""Compile a repeated layer once: stretches of the graph that only differ in their operands become one subgraph.

    …, a₁(x₀, w₁), b₁(…), a₂(x₁, w₂), b₂(…), …   →   x₁ = layer(x₀, w₁, …);  x₂ = layer(x₁, w₂, …);  …

A decoder's layers are traced one after the other, so the graph's list of nodes repeats itself with a period. The
longest such run is cut into its periods where the fewest values cross. Operands from outside, be they weights, the
layer before or a mask that all share, become arguments; what later nodes read becomes results. Inductor compiles an
invoke_subgraph once, however often it is called. Nothing is recognised by name, and a graph that does not repeat is
left as it is.

Writes to static caches, which capture leaves at the end of the graph, move up to where their value is made, if nobody
reads the old value after that: then a layer writes its own part of the cache, in place.
"""

import collections
import dataclasses
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from qcompile.rewrite import copy_graph, is_symbolic, is_view, operands_of, value_kind

SMALLEST = 8  # nodes of a region worth a call
CANDIDATES = 16  # periods that are looked at, the most frequent distances between equal nodes

BODY = "repeated_region"
INVOKE = torch.ops.higher_order.invoke_subgraph


@dataclasses.dataclass(frozen=True)
class Run:
    """`repeats` regions of `period` nodes each, from `start` on, in a list of nodes."""

    start: int
    period: int
    repeats: int

    def regions(self, nodes: Sequence[Node]) -> list[list[Node]]:
        return [
            list(nodes[begin : begin + self.period])
            for begin in range(self.start, self.start + self.period * self.repeats, self.period)
        ]


def outline(gm: GraphModule) -> GraphModule:
    """The same function with its repeated region as a subgraph; gm itself if it has none, or has symbolic sizes."""
    if any(is_symbolic(node) for node in gm.graph.nodes):
        return gm
    outlined = copy_graph(gm)
    _raise_constants(outlined.graph)
    _raise_writes(outlined.graph)
    nodes = [node for node in outlined.graph.nodes if node.op == "call_function"]
    run = find_run(nodes)
    regions = _consistent(run.regions(nodes)) if run is not None else []
    if len(regions) < 2:
        return gm
    _replace(outlined, regions)
    outlined.graph.lint()
    outlined.recompile()
    return outlined


def _raise_constants(graph: Graph) -> None:
    """Above every region that may pass them on."""
    first = next(iter(graph.nodes))
    for node in list(graph.find_nodes(op="get_attr")):
        first.prepend(node)


def _raise_writes(graph: Graph) -> None:
    """copy_(cache, new) to just behind what makes `new`, unless the old contents are read after that."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)):
        target, source = node.args[:2]
        if target.op != "placeholder" or not isinstance(source, Node) or source.op != "call_function":
            continue
        if all(order[reader] <= order[source] for reader in _readers(target) - {node}):
            source.append(node)


def _readers(node: Node) -> set[Node]:
    """Who reads a tensor's memory, through views or directly."""
    found: set[Node] = set()
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user in found:
                continue
            found.add(user)
            if is_view(user):
                stack.append(user)
    return found


def find_run(nodes: Sequence[Node]) -> Run | None:
    """The longest repetition in a list of nodes, cut where the fewest values cross; None if there is none."""
    labels = [_label(node) for node in nodes]
    best: Run | None = None
    for period in _periods(labels):
        for start, length in _stretches(labels, period):
            run = _cut(nodes, start, length, period)
            if run.repeats > 1 and (best is None or _saved(run) > _saved(best)):
                best = run
    return best


def _periods(labels: Sequence[Any]) -> list[int]:
    """The most frequent distances from some nodes in a row to the next nodes like them, or multiples worth a call."""
    places: dict[Any, list[int]] = collections.defaultdict(list)
    for index in range(len(labels) - SMALLEST + 1):
        places[tuple(labels[index : index + SMALLEST])].append(index)
    distances = collections.Counter(b - a for found in places.values() for a, b in itertools.pairwise(found))
    return [distance * -(-SMALLEST // distance) for distance, _ in distances.most_common(CANDIDATES)]


def _saved(run: Run) -> int:
    return run.period * (run.repeats - 1)


def _stretches(labels: Sequence[Any], period: int) -> list[tuple[int, int]]:
    """Where labels repeat with a period: start and length."""
    found = []
    start = 0
    for index in range(len(labels) - period + 1):
        if index == len(labels) - period or labels[index] != labels[index + period]:
            if index - start >= period:
                found.append((start, index - start + period))
            start = index + 1
    return found


def _cut(nodes: Sequence[Node], start: int, length: int, period: int) -> Run:
    """The cut with the fewest crossing values among those that lose at most one repetition."""
    position = {node: index for index, node in enumerate(nodes)}
    last_read = [max((position.get(user, len(nodes)) for user in node.users), default=0) for node in nodes]

    def crossing(cut: int) -> int:
        return sum(last_read[index] >= cut for index in range(max(0, cut - period), cut))

    begin = min(range(start, start + period), key=lambda cut: (crossing(cut + period), cut))
    return Run(begin, period, (start + length - begin) // period)


def _label(node: Node) -> Any:
    """What two nodes must share to be the same operation on different operands."""
    args = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: _OPERAND)
    kinds = [value_kind(other.meta.get("val")) for other in (node, *operands_of(node))]
    return repr((str(node.target), args, kinds))


class _Operand:
    def __repr__(self) -> str:
        return "·"


_OPERAND: Any = _Operand()


def _consistent(regions: list[list[Node]]) -> list[list[Node]]:
    """The regions whose nodes read each other as those of the last one do."""
    reference = _wiring(regions[-1])
    return [region for region in regions if _wiring(region) == reference]


def _wiring(region: list[Node]) -> list[list[int | None]]:
    place = {node: index for index, node in enumerate(region)}
    return [[place.get(operand) for operand in operands_of(node)] for node in region]


def _replace(gm: GraphModule, regions: list[list[Node]]) -> None:
    """Call one body for every region."""
    slots = _slots(regions)
    results = sorted({index for region in regions for index in _read_outside(region)})
    setattr(gm, BODY, _body(gm, regions[0], slots, results))
    renamed: dict[Node, Node] = {}
    for number, region in enumerate(regions):
        operands = [renamed.get(column[number], column[number]) for column in slots]
        with gm.graph.inserting_before(region[0]):
            call = gm.graph.call_function(INVOKE, (gm.graph.get_attr(BODY), BODY, *operands))
            call.meta["val"] = tuple(region[index].meta["val"] for index in results)
            for place, index in enumerate(results):
                renamed[region[index]] = gm.graph.call_function(operator.getitem, (call, place))
                renamed[region[index]].meta = dict(region[index].meta)
        for node in (region[index] for index in results):
            for user in set(node.users) - set(region):
                user.replace_input_with(node, renamed[node])
        for node in reversed(region):
            gm.graph.erase_node(node)


Column = tuple[Node, ...]


def _slots(regions: list[list[Node]]) -> dict[Column, list[tuple[int, int]]]:
    """What comes from outside: per argument of the body the node that each region passes, and where the body reads
    it, as index of the node and of its operand. (In one region two arguments may be the same node.)"""
    inside = set(regions[0])
    found: dict[Column, list[tuple[int, int]]] = {}
    for index, aligned in enumerate(zip(*regions, strict=True)):
        for place, column in enumerate(zip(*map(operands_of, aligned), strict=True)):
            if column[0] not in inside:
                found.setdefault(column, []).append((index, place))
    return found


def _read_outside(region: list[Node]) -> list[int]:
    inside = set(region)
    return [index for index, node in enumerate(region) if any(user not in inside for user in node.users)]


def _body(
    gm: GraphModule, region: list[Node], slots: dict[Column, list[tuple[int, int]]], results: list[int]
) -> GraphModule:
    graph = Graph()
    arguments: dict[tuple[int, int], Node] = {}
    for number, (column, reads) in enumerate(slots.items()):
        argument = graph.placeholder(f"arg{number}")
        argument.meta = dict(column[0].meta)
        arguments |= dict.fromkeys(reads, argument)
    copies: dict[Node, Node] = {}
    for index, node in enumerate(region):
        places = itertools.count()

        def operand(old: Node, index: int = index, places: Iterator[int] = places) -> Node:
            place = next(places)
            return arguments[index, place] if (index, place) in arguments else copies[old]

        copies[node] = graph.node_copy(node, operand)
    graph.output(tuple(copies[region[index]] for index in results))
    return GraphModule(gm, graph)
