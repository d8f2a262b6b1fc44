"""Graphs for other tools."""

import re
from pathlib import Path

import networkx
import torch
from graphs import GatedMLP, captured
from reports import HOSTILE, hostile_report

from qcompile import passes
from qcompile.config import Config
from qcompile.reporting.graph_export import to_networkx, write_dot, write_graphml


def quantized() -> torch.fx.GraphModule:
    graph = captured(GatedMLP(), torch.randn(2, 16)).graph
    return passes.quantizing(Config(calibrate=1)).run(graph)[0]


def test_nodes_and_edges_are_the_graphs() -> None:
    gm = quantized()
    graph = to_networkx(gm)
    assert set(graph) == {node.name for node in gm.graph.nodes}
    assert set(graph.edges) == {(o.name, node.name) for node in gm.graph.nodes for o in node.all_input_nodes}
    product = next(node for node in gm.graph.nodes if node.target is torch.ops.qcompile.scaled_mm.default)
    found = graph.nodes[product.name]
    assert found["target"] == "qcompile.scaled_mm"
    assert found["type"].startswith("f32[2, ")
    assert found["smoothing"] == "norm.weight"
    assert "graphs.py:" in found["source"]


def test_a_part_has_its_own_edges_only() -> None:
    gm = quantized()
    nodes = list(gm.graph.nodes)[-4:]
    graph = to_networkx(gm, nodes)
    assert len(graph) == 4
    assert all(head in graph and tail in graph for tail, head in graph.edges)


def test_graphml_comes_back_as_it_went(tmp_path: Path) -> None:
    graph = to_networkx(quantized())
    write_graphml(graph, tmp_path / "g.graphml")
    back = networkx.read_graphml(tmp_path / "g.graphml")
    assert dict(back.nodes(data=True)) == dict(graph.nodes(data=True))
    assert set(back.edges) == set(graph.edges)


def test_dot_has_every_node_and_edge(tmp_path: Path) -> None:
    graph = to_networkx(quantized())
    write_dot(graph, tmp_path / "g.dot")
    text = (tmp_path / "g.dot").read_text(encoding="utf-8")
    assert len(re.findall(r'^  "(\w+)" \[', text, re.M)) == len(graph)
    assert set(re.findall(r'^  "(\w+)" -> "(\w+)";$', text, re.M)) == set(graph.edges)


def test_hostile_names_do_not_break_either_format(tmp_path: Path) -> None:
    graph = to_networkx(hostile_report().graphs[0])
    graph.add_node('quote " backslash \\ null \0 bell \a', type="\ud800")
    write_graphml(graph, tmp_path / "g.graphml")
    back = networkx.read_graphml(tmp_path / "g.graphml")
    assert len(back) == len(graph)
    linears = {values.get("linear") for _, values in back.nodes(data=True)}
    assert set(HOSTILE) <= linears
    write_dot(graph, tmp_path / "g.dot")
    text = (tmp_path / "g.dot").read_text(encoding="utf-8")
    outside = re.sub(r'"(?:\\.|[^"\\])*"', "S", text)
    assert re.fullmatch(r"digraph \{\n  node \[shape=box\];\n(  S (\[(S=S(, )?)*\]|-> S);\n)*\}\n", outside)
