"""A graph as JSON and tensors, and back: nodes with their names, every value's type, what earlier passes noted."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_arg

from qcompile.errors import GraphError
from qcompile.passes.find_linears import LinearInfo
from qcompile.passes.smooth import Smoothing
from qcompile.rewrite import Input, Origin, fake_mode_of, is_symbolic, is_view, module_of
from qcompile.saved_graph.symbolic_text import Symbols
from qcompile.saved_graph.values import NAMESPACES, decode, decode_value, encode, encode_value, target_of, target_text

NOTES: dict[str, Any] = {"input": Input, "origin": Origin, "linear": LinearInfo, "smoothing": Smoothing}
FACTS = ("whole_model", "already_quantized", "observed")


def describe(
    gm: GraphModule, namespaces: Sequence[str] = NAMESPACES
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The graph for `json.dumps`, and its constants by name; those on the meta device are left out.

    namespaces: of the operators that it may call. Raises GraphError for what has no form as text, such as a graph
    within the graph.
    """
    environment = fake_mode_of(gm).shape_env if any(map(is_symbolic, gm.graph.nodes)) else None
    described = {
        "symbols": Symbols(environment).describe() if environment is not None else [],
        "facts": {name: gm.meta[name] for name in FACTS if name in gm.meta},
        "nodes": [_describe(node, namespaces) for node in gm.graph.nodes],
    }
    constants = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(str(node.target))(gm)
        if not isinstance(value, Tensor):
            raise GraphError(f"a graph within a graph cannot be saved; {node.name} is a {type(value).__name__}")
        if not value.is_meta:
            constants[str(node.target)] = value
    return described, constants


def _describe(node: Node, namespaces: Sequence[str]) -> dict[str, Any]:
    target = target_text(node.target, namespaces) if node.op == "call_function" else str(node.target)
    found = {"name": node.name, "op": node.op, "target": target, "args": encode(node.args)}
    if node.kwargs:
        found["kwargs"] = {key: encode(value) for key, value in node.kwargs.items()}
    if "val" in node.meta:
        found["val"] = encode_value(node.meta["val"])
    if module_of(node):
        found["module"] = module_of(node)
    for key, kind in NOTES.items():
        if isinstance(node.meta.get(key), kind):
            found[key] = dataclasses.asdict(node.meta[key])
    return found


def restore(
    described: Mapping[str, Any],
    constants: Mapping[str, Tensor],
    fake_mode: FakeTensorMode | None = None,
    namespaces: Sequence[str] = NAMESPACES,
) -> GraphModule:
    """The graph again. fake_mode: what its values belong to, a new one by default. Raises GraphError."""
    symbols = Symbols(ShapeEnv())
    symbols.restore(described["symbols"])
    mode = fake_mode or FakeTensorMode(shape_env=symbols.environment, allow_non_fake_inputs=True)
    root = torch.nn.Module()
    for name, value in constants.items():
        root.register_buffer(name, value)
    graph, nodes = Graph(), dict[str, Node]()
    with mode:
        for entry in described["nodes"]:
            node = nodes[entry["name"]] = _node(graph, entry, nodes, namespaces)
            if "val" in entry:
                shares = not described["symbols"] and node.op == "call_function" and is_view(node)
                node.meta["val"] = _computed(node) if shares else decode_value(entry["val"], symbols)
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in root._buffers:
            like = node.meta["val"]
            root.register_buffer(node.target, torch.empty(like.shape, dtype=like.dtype, device="meta"))
    graph.lint()
    gm = GraphModule(root, graph)
    facts = described["facts"]
    gm.meta |= {name: tuples(facts[name]) for name in FACTS if name in facts}
    return gm


def _node(graph: Graph, entry: dict[str, Any], nodes: Mapping[str, Node], namespaces: Sequence[str]) -> Node:
    op, name, target = entry["op"], entry["name"], entry["target"]
    if op not in ("placeholder", "get_attr", "call_function", "output") or not str(name).isidentifier():
        raise GraphError(f"a graph has inputs, constants, calls and an output; got {op!r}, called {name!r}")
    if op == "get_attr" and not target.isidentifier():
        raise GraphError(f"a constant must have a plain name; got {target!r}")
    found = {"call_function": lambda: target_of(target, namespaces), "get_attr": lambda: target}.get(op, lambda: name)()
    kwargs = {str(key): decode(value, nodes) for key, value in entry.get("kwargs", {}).items()}
    node = graph.create_node(op, found, decode(entry["args"], nodes), kwargs, name)
    if node.name != name:
        raise GraphError(f"nodes must have names of their own; there are two called {name!r}, or it is no name")
    if "module" in entry:
        node.meta["nn_module_stack"] = {"saved": (str(entry["module"]), "")}
    for key, kind in NOTES.items():
        if key in entry:
            node.meta[key] = kind(**{name: tuples(value) for name, value in entry[key].items()})
    return node


def _computed(node: Node) -> Any:
    """A value that shares its operand's memory, as whoever plans memory has to know."""
    function: Any = node.target
    args, kwargs = map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    return function(*args, **kwargs)


def tuples(value: Any) -> Any:
    """JSON has lists only; the records of nodes hold tuples."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value
