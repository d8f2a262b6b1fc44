"""The drawing of a layer."""

import itertools

import networkx
import pytest
import torch
from graphs import GatedMLP, captured
from reports import quantized_report, report_of

from qcompile.reporting.layer_graph import drawing, first_layer, layer_nodes, placed
from qcompile.rewrite import module_of


def test_the_layer_drawn_is_the_first_of_the_stack() -> None:
    found = report_of(layers=2)
    assert first_layer(found.graphs[0]) == "model.layers.0"
    nodes = layer_nodes(found.graphs[0], "model.layers.0")
    assert sum(node.target is torch.ops.qcompile.scaled_mm.default for node in nodes) == 4, "siblings are merged"
    assert not any(module_of(node).startswith("model.layers.1") for node in nodes)


def test_groups_have_members_and_what_takes_their_scale() -> None:
    drawn = report_of(layers=2).data["layer"]["float"]
    assert drawn["groups"] == [
        ["model.layers.0.input_layernorm.weight"], ["model.layers.0.self_attn.v_proj.weight"],
        ["model.layers.0.post_attention_layernorm.weight"], ["model.layers.0.mlp.up_proj.weight"],
    ]  # fmt: skip
    members = {
        group: sorted(node["linear"].rpartition(".")[2] for node in nodes)
        for group, nodes in itertools.groupby(
            sorted((n for n in drawn["nodes"] if n["member"] is not None), key=lambda n: n["member"]),
            key=lambda n: n["member"],
        )
    }
    assert members == {0: ["k_proj", "q_proj", "v_proj"], 1: ["o_proj"], 2: ["gate_proj", "up_proj"], 3: ["down_proj"]}
    takes = {group: [n for n in drawn["nodes"] if n["takes"] == [group]] for group in range(4)}
    assert [node["target"] for node in takes[0]] == ["aten.mul.Tensor"]
    assert [node["linear"].rpartition(".")[2] for node in takes[1] + takes[3]] == ["v_proj", "up_proj"]


def test_a_model_without_layers_is_drawn_whole() -> None:
    gm = captured(GatedMLP(), torch.randn(2, 16)).graph
    assert first_layer(gm) == ""
    drawn = drawing(gm, "")
    assert {node["name"] for node in drawn["nodes"]} >= {n.name for n in gm.graph.nodes if n.op == "call_function"
                                                        and n.target is torch.ops.aten.silu.default}
    assert all(node["inside"] for node in drawn["nodes"] if node["op"] == "call_function")


def test_a_quantized_model_is_drawn_too() -> None:
    drawn = quantized_report().data["layer"]["quantized"]
    assert drawn["layer"] == "model.layers.0"
    assert sum(node["target"] == "qcompile.scaled_mm" for node in drawn["nodes"]) >= 4


@pytest.mark.parametrize("which", ["float", "quantized"])
def test_edges_run_downwards_and_boxes_do_not_overlap(which: str) -> None:
    drawn = report_of(layers=2).data["layer"][which]
    places = [tuple(node["place"]) for node in drawn["nodes"]]
    for (a, row_a), (b, row_b) in itertools.combinations(places, 2):
        assert row_a != row_b or abs(a - b) >= 0.99
    for path in drawn["edges"]:
        rows = [row for _, row in path]
        assert rows == list(range(int(rows[0]), int(rows[0]) + len(rows)))


def test_few_edges_cross_in_a_ladder() -> None:
    graph = networkx.DiGraph([("a", "b"), ("c", "d"), ("a", "x"), ("c", "y"), ("b", "e"), ("d", "e")])
    places, _ = placed(graph)
    assert (places["a"][0] < places["c"][0]) == (places["b"][0] < places["d"][0])
    assert places["e"][1] == 2
    assert placed(networkx.DiGraph()) == ({}, [])
