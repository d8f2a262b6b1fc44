"""prepare ∘ run equals the lowered graph; equal weight expressions have equal digests."""

from typing import Any

import pytest
import torch
from graphs import Attention, GatedMLP, captured, outputs
from torch.fx import GraphModule

import qcompile.passes as passes
from qcompile import ops
from qcompile.capture import Captured
from qcompile.config import Config
from qcompile.lowering.inductor import decompositions
from qcompile.lowering.lower import lower
from qcompile.lowering.partition import Partition, partition
from qcompile.lowering.target import Target
from qcompile.rewrite import input_of
from qcompile.weights import evaluate

VNNI = Target("cpu", 0, frozenset({"avx512_vnni"}))


def lowered_graph(capture: Captured, alpha: float = 0.5) -> GraphModule:
    quantized, _ = passes.quantizing(Config(calibrate=1, alpha=alpha)).run(capture.graph)
    return lower(quantized, VNNI, decompositions())[0]


def run_parts(split: Partition, capture: Captured, absmax: float) -> Any:
    leaves = [
        capture.args[input_of(node).index]
        if input_of(node).of is None
        else torch.full(tuple(node.meta["val"].shape), absmax)
        for node in split.prepare_inputs
    ]
    prepared = evaluate(split.prepare, leaves, [entry.node for entry in split.prepared])
    return split.run(*[capture.args[index] for index in split.run_inputs], *prepared)


@pytest.mark.parametrize("model", [GatedMLP, Attention])
def test_the_parts_compute_what_the_whole_does(model: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    capture = captured(model(), torch.randn(2, 5, 16))
    lowered = lowered_graph(capture)
    split = partition(lowered)
    for expected, actual in zip(outputs(lowered, capture, 1.7), run_parts(split, capture, 1.7), strict=True):
        assert torch.equal(actual, expected)


def test_the_run_graph_has_no_weight_work_left() -> None:
    capture = captured(GatedMLP(), torch.randn(2, 5, 16))
    split = partition(lowered_graph(capture))
    assert not [node for node in split.run.graph.nodes if node.target in ops.REFERENCES]
    names = {input_of(n).name for n in split.run.graph.find_nodes(op="placeholder") if "input" in n.meta}
    assert not any("proj" in name for name in names), "float weights do not reach the run graph"
    assert {entry.node.meta["val"].dtype for entry in split.prepared} >= {torch.int8, torch.int32, torch.float32}


def test_digests_know_expressions() -> None:
    capture = captured(GatedMLP(), torch.randn(2, 5, 16))
    once, again, other = (
        [entry.digest for entry in partition(lowered_graph(capture, alpha)).prepared] for alpha in (0.5, 0.5, 0.7)
    )
    assert once == again
    assert len(set(once)) >= 5
    assert not set(once) & set(other), "every prepared tensor here depends on alpha"


def test_another_batch_has_the_same_digests() -> None:
    model = GatedMLP()
    digests = [
        [entry.digest for entry in partition(lowered_graph(captured(model, torch.randn(*shape)))).prepared]
        for shape in ((2, 5, 16), (1, 7, 16))
    ]
    assert digests[0] == digests[1]
