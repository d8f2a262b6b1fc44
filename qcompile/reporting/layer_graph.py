"""One layer of a model as a drawing: which nodes, where they stand, how edges run, which smoothing group they are of.

Nodes stand in rows by their longest path from an input. An edge over several rows gets a bend in every row between;
nodes and bends are ordered by the mean place of what they read, which leaves few crossings.
"""

import itertools
import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule, Node

from qcompile.reporting.channels import SCALES
from qcompile.reporting.graph_export import to_networkx
from qcompile.rewrite import input_of, module_of, static_nodes

if TYPE_CHECKING:
    import networkx

NUMBERED = re.compile(r"^(?:.*?\.)?\d+(?=\.)")
MOST_NODES = 400
SWEEPS = 8
Place = tuple[float, float]


def first_layer(gm: GraphModule) -> str:
    """The module path of the first of the layers that a graph has most nodes of; empty if modules are not numbered."""
    paths = [match[0] for node in gm.graph.nodes if (match := NUMBERED.match(module_of(node) + "."))]
    stacks = Counter(path.rpartition(".")[0] for path in paths)
    if not stacks:
        return ""
    stack = stacks.most_common(1)[0][0]
    return next(path for path in paths if path.rpartition(".")[0] == stack)


def layer_nodes(gm: GraphModule, layer: str) -> list[Node]:
    """The nodes of a layer that run at every call, and those outside that they read; at most 400."""
    static = static_nodes(gm)
    inside = [
        node
        for node in gm.graph.nodes
        if node.op == "call_function"
        and node not in static
        and (not layer or f"{module_of(node)}.".startswith(f"{layer}."))
    ][:MOST_NODES]
    chosen = set(inside)
    chosen.update(operand for node in inside for operand in node.all_input_nodes if operand not in static)
    return [node for node in gm.graph.nodes if node in chosen]


def drawing(gm: GraphModule, layer: str) -> dict[str, Any]:
    """The layer, placed: nodes with their place (column, row), colour group and what they read of the model; edges as
    lists of places. A group is the linears whose scales the same parameters take; what takes them has `takes`."""
    nodes = layer_nodes(gm, layer)
    graph = to_networkx(gm, nodes)
    inside = {node for node in nodes if not layer or f"{module_of(node)}.".startswith(f"{layer}.")}
    places, paths = placed(graph)
    groups: dict[tuple[str, ...], int] = {}
    for node in nodes:
        if (smoothing := node.meta.get("smoothing")) is not None and smoothing.into and node in inside:
            groups.setdefault(smoothing.into, len(groups))
    taking = {name: number for into, number in groups.items() for name in into}
    static = static_nodes(gm)
    drawn = []
    for node in nodes:
        reads = [name for operand in node.all_input_nodes if operand in static for name in _parameters(operand)]
        smoothing = node.meta.get("smoothing") if node in inside else None
        drawn.append(
            {
                "name": node.name,
                **graph.nodes[node.name],
                "inside": node in inside,
                "place": places[node.name],
                "reads": sorted(set(reads)),
                "member": groups.get(smoothing.into) if smoothing is not None else None,
                "takes": sorted({taking[name] for name in reads if name in taking}),
            }
        )
    return {"layer": layer, "nodes": drawn, "edges": paths, "groups": [list(into) for into in groups]}


def _parameters(static: Node) -> list[str]:
    """Names of the parameters in a static expression; what its smoothing scales are made from does not count."""
    stack, seen = [static], {static}
    for node in stack:
        fresh = [operand for operand in node.all_input_nodes if operand not in seen and node.target not in SCALES]
        seen.update(fresh)
        stack += fresh
    return [input_of(n).name for n in stack if n.op == "placeholder" and input_of(n).kind == "parameter"]


def placed(graph: "networkx.DiGraph") -> tuple[dict[str, Place], list[list[Place]]]:
    """Places (column, row) of the nodes of an acyclic graph, and the edges as the places that they pass through."""
    import networkx

    rows: dict[Any, int] = {}
    for name in networkx.topological_sort(graph):
        rows[name] = 1 + max((rows[operand] for operand in graph.predecessors(name)), default=-1)
    for name in reversed(list(networkx.topological_sort(graph))):  # what reads nothing stands near its first reader
        if not graph.in_degree(name) and graph.out_degree(name):
            rows[name] = min(rows[reader] for reader in graph.successors(name)) - 1
    chains = [_chain(tail, head, rows) for tail, head in graph.edges]
    places = _ordered(rows, chains)
    return {name: places[name] for name in graph}, [[places[point] for point in chain] for chain in chains]


def _chain(tail: str, head: str, rows: dict[Any, int]) -> list[Any]:
    """An edge's ends and the bends between them; edges from one node share their bends."""
    bends = [(tail, row) for row in range(rows[tail] + 1, rows[head])]
    rows.update({bend: bend[1] for bend in bends})
    return [tail, *bends, head]


def _ordered(rows: dict[Any, int], chains: list[list[Any]]) -> dict[Any, Place]:
    above, below = defaultdict(set), defaultdict(set)
    for chain in chains:
        for upper, lower in itertools.pairwise(chain):
            above[lower].add(upper)
            below[upper].add(lower)
    levels: dict[int, list[Any]] = defaultdict(list)
    for point, row in rows.items():
        levels[row].append(point)
    column = {point: float(i) for level in levels.values() for i, point in enumerate(level)}
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        neighbours = above if down else below
        for row in sorted(levels, reverse=not down):
            level = levels[row]
            wanted = {p: _mean([column[q] for q in neighbours[p]], column[p]) for p in level}
            level.sort(key=lambda p, wanted=wanted: wanted[p])  # type: ignore[misc]
            column.update(_spread([wanted[p] for p in level], level))
    least = min(column.values(), default=0.0)
    return {point: (round(column[point] - least, 2), float(rows[point])) for point in rows}


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _spread(wanted: list[float], level: list[Any]) -> dict[Any, float]:
    """Columns at least 1 apart, in order, around the wanted ones."""
    columns: list[float] = []
    for want in wanted:
        columns.append(max(want, columns[-1] + 1) if columns else want)
    shift = sum(w - c for w, c in zip(wanted, columns, strict=True)) / max(1, len(columns))
    return {point: column + shift for point, column in zip(level, columns, strict=True)}
