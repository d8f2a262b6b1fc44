"""Outlining: what repeats is called, what does not is left alone, and the function stays the same to the bit."""

from collections.abc import Callable

import pytest
import torch
from graphs import captured
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from qcompile.lowering.inductor import compile_inductor, decompositions
from qcompile.lowering.lower import lower
from qcompile.lowering.outline import BODY, INVOKE, Run, _raise_writes, find_run, outline
from qcompile.lowering.partition import partition
from qcompile.lowering.target import Target

COPY = torch.ops.aten.copy_.default


class Layer(nn.Module):
    def __init__(self, width: int = 16, *, gate: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 24), nn.Linear(24, width)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.up(self.norm(x)))
        y = y * torch.sigmoid(y) if self.gate else y
        return x + self.down(y)


class Stack(nn.Module):
    """Layers one after the other, between an input and an output of their own."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x) * 2
        for layer in self.layers:
            x = layer(x)
        return torch.cos(x).sum(-1)


class Skipping(Stack):
    """Every second layer also adds what entered the model."""

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for index, layer in enumerate(self.layers):
            x = layer(x) + first if index % 2 else layer(x) + x
        return x


class Cached(nn.Module):
    """Layers that each write rows of a cache of their own and read all of it."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        for index in range(layers):
            self.register_buffer(f"cache{index}", torch.zeros(6, 8))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            cache = getattr(self, f"cache{index}")
            cache.copy_(cache.index_put((position,), torch.tanh(layer(x))))
            x = x + torch.softmax(x @ cache.T, -1) @ cache
        return x


def run_graph(model: nn.Module, *inputs: Tensor, dynamic: bool = False) -> tuple[GraphModule, list[Tensor]]:
    """The graph that Inductor gets, and arguments for it."""
    torch.manual_seed(0)
    capture = captured(model.requires_grad_(False), *inputs, dynamic=dynamic)
    part = partition(lower(capture.graph, Target("cpu"), decompositions())[0])
    assert not part.prepared
    return part.run, [capture.args[index] for index in part.run_inputs]


def calls(gm: GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=INVOKE))


def body(gm: GraphModule) -> GraphModule:
    found = getattr(gm, BODY)
    assert isinstance(found, GraphModule)
    return found


def compiled(gm: GraphModule, args: list[Tensor]) -> list[Tensor]:
    return list(compile_inductor(gm, [], None)(list(args)))


@pytest.mark.inductor
@pytest.mark.parametrize("layers", [2, 5])
def test_layers_become_calls_of_one_body(layers: int) -> None:
    gm, args = run_graph(Stack([Layer() for _ in range(layers)]), torch.randn(3, 16))
    outlined = outline(gm)
    assert calls(outlined) == layers
    assert len(body(outlined).graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)) == 1
    assert outlined.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default) == []
    assert len(outlined.graph.find_nodes(op="placeholder")) == len(gm.graph.find_nodes(op="placeholder"))
    for actual, expected in zip(compiled(outlined, args), compiled(gm, args), strict=True):
        assert torch.equal(actual, expected)


def test_the_graph_given_is_left_alone() -> None:
    gm, _ = run_graph(Stack([Layer() for _ in range(3)]), torch.randn(3, 16))
    before = str(gm.graph)
    assert outline(gm) is not gm
    assert str(gm.graph) == before


@pytest.mark.inductor
@pytest.mark.parametrize(("gated", "expected"), [
    ([True, False, False, False], 3), ([False, False, False, True], 3), ([False, False, True, False, False], 2),
], ids=str)  # fmt: skip
def test_layers_that_differ_stay_as_they_are(gated: list[bool], expected: int) -> None:
    gm, args = run_graph(Stack([Layer(gate=gate) for gate in gated]), torch.randn(3, 16))
    outlined = outline(gm)
    assert calls(outlined) == expected
    for actual, want in zip(compiled(outlined, args), compiled(gm, args), strict=True):
        assert torch.equal(actual, want)


@pytest.mark.inductor
def test_two_layers_may_be_one_region() -> None:
    gm, args = run_graph(Skipping([Layer() for _ in range(6)]), torch.randn(3, 16))
    outlined = outline(gm)
    assert calls(outlined) >= 2
    for actual, want in zip(compiled(outlined, args), compiled(gm, args), strict=True):
        assert torch.equal(actual, want)


@pytest.mark.parametrize("layers", [
    [Layer()], [Layer(), Layer(gate=True)], [Layer(16), nn.Linear(16, 8), Layer(8)],
], ids=["one", "two that differ", "other widths"])  # fmt: skip
def test_what_does_not_repeat_is_returned_as_it_is(layers: list[nn.Module]) -> None:
    gm, _ = run_graph(Stack(layers), torch.randn(3, 16))
    assert outline(gm) is gm


@pytest.mark.inductor
def test_operands_of_another_layout_are_not_the_same_layer() -> None:
    """Code is compiled for strides; a weight that lies transposed has others, whatever comes out of the product."""

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weights = [torch.randn(16, 16) if index < 2 else torch.randn(16, 16).T for index in range(4)]
            self.weights = nn.ParameterList(weights)

        def forward(self, x: Tensor) -> Tensor:
            for weight in self.weights:
                y = torch.sin(x @ weight) * torch.sigmoid(x) + torch.cos(x)
                x = torch.tanh(y * weight.sum(0)) + torch.atan(x)
            return x

    gm, args = run_graph(Products(), torch.randn(16, 16))
    outlined = outline(gm)
    assert calls(outlined) == 2
    for actual, want in zip(compiled(outlined, args), compiled(gm, args), strict=True):
        assert torch.equal(actual, want)


def test_constants_stand_above_the_regions_that_pass_them_on() -> None:
    root = nn.Module()
    root.register_buffer("constant", torch.ones(3))
    graph = Graph()
    x = graph.placeholder("x")
    for _ in range(2):
        for step in range(9):
            x = graph.call_function(torch.ops.aten.sin.default, (x,))
            if step == 4:
                x = graph.call_function(torch.ops.aten.mul.Tensor, (x, graph.get_attr("constant")))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(3, device="meta")
    graph.output((x,))
    outlined = outline(GraphModule(root, graph))
    assert calls(outlined) == 2
    assert len(body(outlined).graph.find_nodes(op="placeholder")) == 2


def test_symbolic_sizes_are_left_alone() -> None:
    gm, _ = run_graph(Stack([Layer() for _ in range(3)]), torch.randn(3, 16), dynamic=True)
    assert outline(gm) is gm


@pytest.mark.inductor
def test_caches_are_written_in_place_by_their_layer() -> None:
    gm, args = run_graph(Cached(4), torch.randn(2, 8), torch.tensor([1, 4]))
    outlined = outline(gm)
    assert calls(outlined) == 4
    assert outlined.graph.find_nodes(op="call_function", target=COPY) == []
    assert len(body(outlined).graph.find_nodes(op="call_function", target=COPY)) == 1
    copies = [[torch.zeros(6, 8) if x.shape == (6, 8) else x for x in args] for _ in range(2)]
    results = [compiled(graph, copy) for graph, copy in zip((outlined, gm), copies, strict=True)]
    for actual, expected in zip((*results[0], *copies[0]), (*results[1], *copies[1]), strict=True):
        assert torch.equal(actual, expected)
    caches = [x for x in copies[0] if x.shape == (6, 8)]
    assert [x.abs().sum(1).bool().tolist() for x in caches] == [[False, True, False, False, True, False]] * 4


@pytest.mark.parametrize("late", ["cache", "view", ""])
def test_a_write_stays_behind_those_who_read_the_old_contents(late: str) -> None:
    """Directly or through a view."""
    graph = Graph()
    x, cache = graph.placeholder("x"), graph.placeholder("cache")
    view = graph.call_function(torch.ops.aten.view.default, (cache, [-1]))
    new = graph.call_function(torch.ops.aten.sin.default, (x,))
    operand = {"cache": cache, "view": view, "": new}[late]
    reader = graph.call_function(torch.ops.aten.cos.default, (operand,))
    write = graph.call_function(COPY, (cache, new))
    graph.output((reader,))
    _raise_writes(graph)
    order = list(graph.nodes)
    assert order.index(write) == order.index(reader) + 1 if late else order.index(write) == order.index(new) + 1


def operation(name: str) -> Callable[..., Tensor]:
    return {"a": torch.sin, "b": torch.cos, "c": torch.tanh}[name]


@pytest.mark.parametrize(("letters", "expected"), [
    ("aabbccab" * 3, (8, 3)),
    ("c" + "aabbccab" * 2 + "b", (8, 2)),
    ("aabbccab", None),
    ("ab" * 8, (8, 2)),
], ids=str)  # fmt: skip
def test_the_longest_repetition_is_found(letters: str, expected: tuple[int, int] | None) -> None:
    class Letters(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for letter in letters:
                x = operation(letter)(x)
            return x

    gm, _ = run_graph(Letters(), torch.randn(3))
    run = find_run([node for node in gm.graph.nodes if node.op == "call_function"])
    assert (None if run is None else (run.period, run.repeats)) == expected
    assert run is None or isinstance(run, Run)
