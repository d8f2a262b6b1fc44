"""Split a lowered graph into what depends on weights alone and what runs on every call.

    prepare:  parameters, statistics → quantized weights, scales, row sums, smoothed gains     (once per weights)
    run:      inputs, remaining parameters, prepared tensors → outputs                         (every call)

Prepared tensors enter the run graph as inputs, not constants: all graphs of a model share them, Inductor's cache key
does not depend on their values, and changed weights are rebound without a new compilation.
"""

import dataclasses
import hashlib
from operator import attrgetter
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from qcompile import ops
from qcompile.rewrite import input_of, output_of, static_nodes


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One tensor the run graph takes: the node of the prepare graph that yields it, a digest of the expression
    (equal digests on equal leaves mean equal tensors), and the leaves, as indices of the prepare graph's inputs."""

    node: Node
    digest: str
    leaves: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Partition:
    """prepare: graph over parameters and statistics. run: graph over the original inputs at `run_inputs`, followed by
    one input per entry of `prepared`."""

    prepare: GraphModule
    prepared: tuple[Prepared, ...]
    run: GraphModule
    run_inputs: tuple[int, ...]

    @property
    def prepare_inputs(self) -> list[Node]:
        """The placeholders of `prepare`, with an Input record each."""
        return list(self.prepare.graph.find_nodes(op="placeholder"))

    @property
    def parameters(self) -> list[int]:
        """Which of the captured graph's arguments are the parameters that `prepare` reads, in its order."""
        records = map(input_of, self.prepare_inputs)
        return [record.index for record in records if record.kind == "parameter"]


def partition(gm: GraphModule) -> Partition:
    """Split gm. Its placeholders carry an Input record each; statistics do not reach the run graph."""
    static = static_nodes(gm)
    derived = _derived(gm, static)
    frontier = [n for n in gm.graph.nodes if n in derived and any(u not in derived for u in n.users)]
    prepare, inputs, copies = _prepare_graph(gm, frontier)
    digests = _Digests(gm, inputs)
    prepared = tuple(Prepared(copies[node], *digests.of(node)) for node in frontier)
    run, run_inputs = _run_graph(gm, frontier)
    return Partition(prepare, prepared, run, run_inputs)


def _derived(gm: GraphModule, static: set[Node]) -> set[Node]:
    """Static nodes that qcompile made: computed from a statistic, or by the dialect, or small enough to be worth
    keeping beside an 8-bit weight of the model (its row sums). The model's own static expressions (a tied head's
    transpose, say) stay where they are, as stock Inductor has them."""
    derived: set[Node] = set()
    sizes: dict[Node, int] = {}
    for node in gm.graph.nodes:
        if node not in static:
            continue
        if node.op == "placeholder":
            mine = input_of(node).kind == "statistic"
        else:
            mine = node.target in ops.REFERENCES or any(operand in derived for operand in node.all_input_nodes)
        sizes[node] = _quantized_size(node, sizes)
        if mine or _numel(node) < sizes[node]:
            derived.add(node)
    return derived


def _quantized_size(node: Node, sizes: dict[Node, int]) -> int:
    """Elements of the largest 8-bit weight of the model that a static node is computed from; 0 if there is none."""
    if node.op == "placeholder":
        return _numel(node) if node.meta["val"].dtype in ops.QUANTIZED_MAX else 0
    return max((sizes[operand] for operand in node.all_input_nodes), default=0)


def _numel(node: Node) -> int:
    value = node.meta.get("val")
    return int(value.numel()) if isinstance(value, torch.Tensor) else 0


def _prepare_graph(gm: GraphModule, frontier: list[Node]) -> tuple[GraphModule, list[Node], dict[Node, Node]]:
    needed = set(frontier)
    for node in reversed(list(gm.graph.nodes)):
        if node in needed:
            needed.update(node.all_input_nodes)
    graph = Graph()
    copies: dict[Node, Node] = {}
    inputs: list[Node] = []
    for node in gm.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            if node.op == "placeholder":
                inputs.append(node)
    graph.output(tuple(copies[node] for node in frontier))
    return GraphModule(gm, graph), inputs, copies


def _run_graph(gm: GraphModule, frontier: list[Node]) -> tuple[GraphModule, tuple[int, ...]]:
    needed: set[Node] = {output_of(gm.graph)}
    stop = set(frontier)
    for node in reversed(list(gm.graph.nodes)):
        keep = node in needed or (node.op == "placeholder" and input_of(node).kind == "activation")
        if keep or (node.op == "call_function" and node.is_impure()):
            needed.add(node)
            if node not in stop:
                needed.update(node.all_input_nodes)
    graph = Graph()
    copies: dict[Node, Node] = {}
    run_inputs: list[int] = []
    for node in gm.graph.find_nodes(op="placeholder"):
        if node in needed and node not in stop:
            copies[node] = graph.node_copy(node)
            run_inputs.append(input_of(node).index)
    for index, node in enumerate(frontier):
        copies[node] = graph.placeholder(f"prepared_{index}")
        copies[node].meta = dict(node.meta)
    for node in gm.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    return GraphModule(gm, graph), tuple(run_inputs)


class _Digests:
    """A digest per static expression, with its leaves numbered in order of appearance."""

    def __init__(self, gm: GraphModule, inputs: list[Node]) -> None:
        self._gm, self._position = gm, {node: index for index, node in enumerate(inputs)}

    def of(self, root: Node) -> tuple[str, tuple[int, ...]]:
        hasher = hashlib.blake2b(digest_size=16)
        leaves: list[int] = []
        numbers: dict[Node, int] = {}

        def visit(node: Node) -> str:
            if node in numbers:
                return f"#{numbers[node]}"
            text = describe(node)
            numbers[node] = len(numbers)
            hasher.update(f"{numbers[node]}={text};".encode())
            return f"#{numbers[node]}"

        def describe(node: Node) -> str:
            if node.op == "placeholder":
                leaves.append(self._position[node])
                return f"leaf {len(leaves) - 1}"
            if node.op == "get_attr":
                return _content(attrgetter(str(node.target))(self._gm))
            args = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: _Text(visit(n)))
            return f"{node.target}{args}"

        visit(root)
        return hasher.hexdigest(), tuple(leaves)


class _Text(str):
    """Prints as itself, without quotes, inside nested argument lists."""

    def __repr__(self) -> str:
        return str(self)


def _content(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    with torch.utils._python_dispatch._disable_current_modes():
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{value.dtype}{list(value.shape)}{hashlib.blake2b(data, digest_size=16).hexdigest()}"
