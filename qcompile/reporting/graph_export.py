"""Graphs for other tools: networkx, and through it DOT and GraphML."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch.fx import GraphModule, Node

from qcompile.atomic_file import write_file
from qcompile.dump import target_text, type_text
from qcompile.passes.find_linears import LinearInfo
from qcompile.reporting.graphs import source_of
from qcompile.rewrite import module_of

if TYPE_CHECKING:
    import networkx

# What XML cannot hold, not even escaped.
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_networkx(gm: GraphModule, nodes: Iterable[Node] | None = None) -> "networkx.DiGraph":
    """A graph, or the part of it that `nodes` are: an edge from each operand to its reader.

    Node attributes, all text: op, target, type (such as "f32[2, 64]"), module, source, by (the pass that made it), and
    for linears linear, group and smoothing (the parameters that take its folded scales).
    """
    import networkx

    chosen = list(gm.graph.nodes if nodes is None else nodes)
    graph = networkx.DiGraph()
    for node in chosen:
        graph.add_node(node.name, **_attributes(node))
    for node in chosen:
        graph.add_edges_from((operand.name, node.name) for operand in node.all_input_nodes if operand.name in graph)
    return graph


def _attributes(node: Node) -> dict[str, str]:
    origin, record = node.meta.get("origin"), node.meta.get("input")
    info: LinearInfo | None = node.meta.get("linear")
    smoothing = node.meta.get("smoothing")
    return {
        "op": node.op,
        "target": record.name if record is not None else target_text(node.target),
        "type": type_text(node.meta.get("val")),
        "module": module_of(node),
        "source": source_of(node),
        "by": origin.by if origin is not None else "",
        "linear": info.name if info is not None else "",
        "group": str(info.group) if info is not None else "",
        "smoothing": " ".join(smoothing.into) if smoothing is not None else "",
    }


def write_dot(graph: "networkx.DiGraph", path: str | Path) -> None:
    """Write a graph in Graphviz's language, complete or not at all. Raises ConfigError."""
    lines = ["digraph {", "  node [shape=box];"]
    for name, attributes in graph.nodes(data=True):
        pairs = {"label": f"{name}: {attributes.get('type', '')}\n{attributes.get('target', '')}", **attributes}
        inside = ", ".join(f"{_quoted(key)}={_quoted(value)}" for key, value in pairs.items())
        lines.append(f"  {_quoted(name)} [{inside}];")
    lines += [f"  {_quoted(tail)} -> {_quoted(head)};" for tail, head in graph.edges]
    write_file(path, "\n".join([*lines, "}", ""]))


def _quoted(value: object) -> str:
    text = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\0", "\ufffd")
    return f'"{text}"'


def write_graphml(graph: "networkx.DiGraph", path: str | Path) -> None:
    """Write a graph as GraphML, complete or not at all. Raises ConfigError."""
    import networkx

    clean = networkx.DiGraph()
    clean.add_nodes_from((_clean(name), _cleaned(values)) for name, values in graph.nodes(data=True))
    clean.add_edges_from((_clean(tail), _clean(head)) for tail, head in graph.edges)
    write_file(path, "\n".join(networkx.generate_graphml(clean)) + "\n")


def _cleaned(values: dict[str, object]) -> dict[str, str]:
    return {_clean(key): _clean(value) for key, value in values.items()}


def _clean(value: object) -> str:
    return NOT_XML.sub("\ufffd", str(value))
