"""prepare ∘ run equals the lowered graph; equal weight expressions have equal digests."""

from typing import Any

import pytest
import torch
from graphs import Attention, GatedMLP, captured, outputs
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

import qcompile.passes as passes
from qcompile import ops
from qcompile.captured import Captured
from qcompile.config import Config
from qcompile.lowering.inductor import decompositions
from qcompile.lowering.lower import lower
from qcompile.lowering.partition import Partition, Prepared, partition
from qcompile.lowering.target import detect
from qcompile.rewrite import Input, input_of
from qcompile.weights import evaluate

VNNI = detect(torch.device("cpu"))


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
    unsigned = VNNI.features & {"avx512_vnni", "avx_vnni", "amx_int8"}
    row_sums = {torch.int32} if unsigned else set()
    assert {entry.node.meta["val"].dtype for entry in split.prepared} >= {torch.int8, torch.float32} | row_sums


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


def placeholders(gm: GraphModule) -> list[Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def test_statistics_stay_on_the_prepare_side() -> None:
    capture = captured(GatedMLP(), torch.randn(2, 5, 16))
    split = partition(lowered_graph(capture))
    kinds = [input_of(node).kind for node in split.prepare_inputs]
    assert "statistic" in kinds
    assert "activation" not in kinds
    assert all(index < len(capture.args) for index in split.run_inputs)
    assert len(placeholders(split.run)) == len(split.run_inputs) + len(split.prepared)


def test_only_what_qcompile_made_is_prepared() -> None:
    """A static expression of the model's own is left to Inductor, computed from the live parameter."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.gain = nn.Linear(16, 16), nn.Parameter(torch.rand(16))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.gain.exp()

    capture = captured(Scaled(), torch.randn(2, 16))
    split = partition(lowered_graph(capture))
    assert [node.target for node in split.run.graph.nodes].count(torch.ops.aten.exp.default) == 1
    assert "gain" in {input_of(node).name for node in placeholders(split.run) if "input" in node.meta}
    assert "gain" not in {input_of(node).name for node in split.prepare_inputs}


def test_writes_stay_on_the_run_side() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            cache.copy_(self.fc(x))
            return torch.relu(self.fc(x))

    cache = torch.zeros(2, 16)
    capture = captured(Cached(), torch.randn(2, 16), cache)
    split = partition(lowered_graph(capture))
    assert len(split.run.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)) == 1
    cache.zero_()
    (y,) = run_parts(split, capture, 1.0)
    assert y.any()
    assert torch.equal(cache.relu(), y)


def expression(target: Any, *, constant: Tensor | None = None, swapped: bool = False, extra: Any = None) -> Prepared:
    """The one prepared tensor of a graph that quantizes target(p, q) · constant and multiplies x by its scale."""
    graph = Graph()
    nodes = [graph.placeholder(name) for name in ("p", "q", "x")]
    for index, (node, kind) in enumerate(zip(nodes, ("parameter", "parameter", "activation"), strict=True)):
        node.meta = {"input": Input(kind, node.name, index), "val": torch.zeros(4, 4)}  # type: ignore[arg-type]
    root = nn.Module()
    value = graph.call_function(target, tuple(nodes[1::-1] if swapped else nodes[:2]))
    if constant is not None:
        root.register_buffer("constant", constant)
        value = graph.call_function(torch.mul, (value, graph.get_attr("constant")))
    scale = graph.call_function(ops.rescale, (value, [] if extra is None else [value] * extra))
    graph.output((graph.call_function(torch.mul, (nodes[2], scale)),))
    (only,) = partition(GraphModule(root, graph)).prepared
    return only


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        ({"target": torch.add}, {"target": torch.add}, True),
        ({"target": torch.add}, {"target": torch.sub}, False),
        ({"target": torch.add}, {"target": torch.add, "extra": 1}, False),
        ({"target": torch.add, "extra": 1}, {"target": torch.add, "extra": 2}, False),
        ({"target": torch.add, "constant": torch.arange(4)}, {"target": torch.add}, False),
        ({"target": torch.add, "constant": torch.arange(4)}, {"target": torch.add, "constant": torch.arange(4)}, True),
        (
            {"target": torch.add, "constant": torch.arange(4)},
            {"target": torch.add, "constant": -torch.arange(4)},
            False,
        ),
        (
            {"target": torch.add, "constant": torch.zeros(4)},
            {"target": torch.add, "constant": torch.zeros(4, dtype=torch.int32)},
            False,
        ),
        (
            {"target": torch.add, "constant": torch.zeros(4, 1)},
            {"target": torch.add, "constant": torch.zeros(1, 4)},
            False,
        ),
    ],
)
def test_digests_are_equal_for_equal_expressions_only(left: Any, right: Any, equal: bool) -> None:
    assert (expression(**left).digest == expression(**right).digest) is equal


def test_leaves_are_numbered_by_appearance() -> None:
    """p − q and q − p are one expression on other leaves, so the leaves must come in the expression's order."""
    forth, back = expression(torch.sub), expression(torch.sub, swapped=True)
    assert forth.digest == back.digest
    assert forth.leaves == (0, 1)
    assert back.leaves == (1, 0)


def test_row_sums_of_a_models_own_8_bit_weight_are_prepared_and_the_weight_is_not() -> None:
    from torch import nn

    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randint(-9, 9, (8, 16), dtype=torch.int8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.float().t() + self.weight.sum(1)

    split = partition(captured(Quantized(), torch.randn(3, 16)).graph)
    assert [entry.node.meta["val"].shape for entry in split.prepared] == [(8,)]
