"""The one door to graph mutation keeps names, values and origins straight."""

from typing import Any

import pytest
import torch
from graphs import GatedMLP, captured, targets
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile import ops
from qcompile.dump import graph_text
from qcompile.rewrite import (
    Input,
    Origin,
    Rewriter,
    copy_graph,
    eliminate_unused,
    fake_mode_of,
    hint,
    input_of,
    is_float,
    module_of,
    output_of,
    raise_static,
    same,
    shape_of,
    static_nodes,
    where,
)

aten = torch.ops.aten


def mlp(*, dynamic: bool = False) -> GraphModule:
    return captured(GatedMLP(), torch.randn(3, 16), dynamic=dynamic).graph


def first(gm: GraphModule, target: Any) -> Node:
    return next(iter(gm.graph.find_nodes(op="call_function", target=target)))


def parameter(gm: GraphModule, name: str) -> Node:
    return next(n for n in gm.graph.find_nodes(op="placeholder") if input_of(n).name == name)


def test_a_copy_is_the_same_graph_and_can_be_edited_apart() -> None:
    gm = mlp()
    gm.meta["note"] = 1
    text, copied = graph_text(gm), copy_graph(gm)
    assert graph_text(copied) == text
    assert copied.meta["note"] == 1
    assert [node.name for node in copied.graph.nodes] == [node.name for node in gm.graph.nodes]
    silu = first(copied, aten.silu.default)
    silu.replace_all_uses_with(silu.args[0])
    silu.meta["origin"] = Origin("test", "silu")
    copied.graph.erase_node(silu)
    copied.meta["note"] = 2
    assert graph_text(gm) == text
    assert gm.meta["note"] == 1


def test_a_copy_shares_constants() -> None:
    gm = mlp()
    Rewriter(gm, "test").constant(torch.arange(3), before=output_of(gm.graph), name="table")
    assert copy_graph(gm).table_0 is gm.table_0


def test_emitted_nodes_know_value_origin_and_module() -> None:
    gm = mlp()
    rewriter, silu = Rewriter(gm, "test"), first(gm, aten.silu.default)
    node = rewriter.emit(ops.rescale, (silu.args[0], []), before=silu, of=silu, name="new")
    assert node.name == "new"
    assert node.meta["val"].shape == silu.meta["val"].shape
    assert node.meta["val"].fake_mode is fake_mode_of(gm)
    assert node.meta["origin"] == Origin("test", silu.name)
    assert module_of(node) == module_of(silu)
    assert rewriter.changes == 1
    order = list(gm.graph.nodes)
    assert order.index(node) == order.index(silu) - 1


def test_items_of_a_tuple() -> None:
    gm = mlp()
    rewriter, silu = Rewriter(gm, "test"), first(gm, aten.silu.default)
    pair = rewriter.emit(ops.quantize, (silu.args[0], [], "row", torch.int8), before=silu, of=silu, name="pair")
    scale = rewriter.item(pair, 1, before=silu, name="scale")
    assert scale.meta["val"].dtype == torch.float32
    assert scale.meta["val"].shape == (3,)


def test_constants_get_names_of_their_own() -> None:
    gm = mlp()
    rewriter, end = Rewriter(gm, "test"), output_of(gm.graph)
    values = [torch.arange(3), torch.ones(2, 2)]
    nodes = [rewriter.constant(value, before=end, name="table") for value in values]
    assert [node.target for node in nodes] == ["table_0", "table_1"]
    for node, value in zip(nodes, values, strict=True):
        assert getattr(gm, str(node.target)) is value
        assert node.meta["val"].shape == value.shape
        assert node.meta["val"].dtype == value.dtype
    assert not gm.state_dict()


def test_one_statistic_per_weight_after_the_inputs() -> None:
    gm = mlp()
    count, rewriter = len(gm.graph.find_nodes(op="placeholder")), Rewriter(gm, "test")
    up, down = parameter(gm, "up_proj.weight"), parameter(gm, "down_proj.weight")
    one, two = rewriter.statistic(up, 16), rewriter.statistic(down, 24)
    assert rewriter.statistic(up, 16) is one
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    assert placeholders[count:] == [one, two]
    assert input_of(one) == Input("statistic", "up_proj.weight", count, input_of(up).index)
    assert input_of(two) == Input("statistic", "down_proj.weight", count + 1, input_of(down).index)
    assert one.meta["val"].shape == (16,)
    assert one.meta["val"].dtype == torch.float32


def test_replace_and_set_input() -> None:
    gm = mlp()
    rewriter, silu = Rewriter(gm, "test"), first(gm, aten.silu.default)
    (gate,) = silu.all_input_nodes
    (product,) = silu.users
    relu = rewriter.emit(aten.relu.default, (gate,), before=silu, of=silu, name="relu")
    rewriter.replace(silu, relu)
    assert relu in product.all_input_nodes
    assert "aten.silu.default" not in targets(gm)
    rewriter.set_input(product, relu, gate)
    assert gate in product.all_input_nodes
    assert rewriter.changes == 3
    gm.graph.lint()


def test_what_depends_on_the_model_alone_is_static() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("table", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.fc.weight * self.table[torch.multinomial(self.table, 4)]
            noise = self.fc.weight + 1
            return x @ weight + x @ noise + torch.arange(4)

    gm = captured(Model(), torch.randn(2, 4)).graph
    static = static_nodes(gm)
    names = {node.name for node in static}
    assert {node.name for node in gm.graph.find_nodes(op="placeholder") if input_of(node).kind == "parameter"} <= names
    assert first(gm, aten.add.Tensor) in static
    assert first(gm, aten.multinomial.default) not in static
    for node in gm.graph.nodes:
        if any(i.name not in names for i in node.all_input_nodes):
            assert node not in static


def test_writes_are_not_static() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x + self.count

    gm = captured(Model(), torch.randn(2, 4)).graph
    assert not static_nodes(gm)
    writes = len(gm.graph.find_nodes(op="call_function", target=aten.copy_.default))
    assert writes == 1
    eliminate_unused(gm)
    assert len(gm.graph.find_nodes(op="call_function", target=aten.copy_.default)) == 1


def test_static_nodes_can_be_raised() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) @ (self.weight * 2).t()

    graph = captured(Model(), torch.randn(2, 4))
    gm = copy_graph(graph.graph)
    raise_static(gm)
    gm.graph.lint()
    gm.recompile()
    static = static_nodes(gm)
    order = [node in static for node in gm.graph.nodes if node.op == "call_function"]
    assert order == sorted(order, reverse=True)
    assert order[0]
    assert not order[-1]
    assert torch.equal(gm(*graph.args)[0], graph.graph(*graph.args)[0])


def test_unused_nodes_go_and_inputs_stay() -> None:
    gm = mlp()
    before = graph_text(gm)
    assert eliminate_unused(gm) == 0
    rewriter, end = Rewriter(gm, "test"), output_of(gm.graph)
    silu = first(gm, aten.silu.default)
    one = rewriter.emit(aten.relu.default, (silu,), before=end, of=silu, name="one")
    rewriter.emit(aten.relu.default, (one,), before=end, of=silu, name="two")
    rewriter.constant(torch.zeros(1), before=end, name="unread")
    assert eliminate_unused(gm) == 3
    assert graph_text(gm) == before


def test_shapes_and_hints() -> None:
    gm = mlp(dynamic=True)
    silu = first(gm, aten.silu.default)
    assert isinstance(silu.meta["val"].shape[0], torch.SymInt)
    assert shape_of(silu) == (3, 24)
    assert hint(7) == 7
    assert is_float(silu)
    assert not is_float(output_of(gm.graph))


@pytest.mark.parametrize(("values", "answer"), [([], True), ([1], True), ([1, 1], True), ([1, 2], False)])
def test_same(values: list[int], answer: bool) -> None:
    assert same(values) is answer


def test_modules_are_named_by_their_path() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([GatedMLP(), GatedMLP()])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x))

    gm = captured(Deep(), torch.randn(3, 16)).graph
    products = gm.graph.find_nodes(op="call_function", target=aten.mm.default)
    assert [module_of(node) for node in products] == [
        f"layers.{i}.{name}" for i in (0, 1) for name in ("gate_proj", "up_proj", "down_proj")
    ]
    assert where(next(iter(products))) == "mm in layers.0.gate_proj"


def test_modules_are_named_in_classes_that_find_attributes_themselves() -> None:
    """As models of diffusers and PEFT do; Dynamo then writes down how nn.Module finds them."""

    class Finding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.extra = nn.ModuleList([nn.Linear(16, 16)]), nn.Linear(16, 16)

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layers[0](x) + self._modules["extra"](x)
            return y

    gm = captured(Finding(), torch.randn(3, 16)).graph
    products = gm.graph.find_nodes(op="call_function", target=aten.addmm.default)
    assert [module_of(node) for node in products] == ["layers.0", "extra"]


def test_without_a_module_the_node_is_named() -> None:
    gm = make_fx(lambda x: x + 1)(torch.zeros(2))
    node = first(gm, aten.add.Tensor)
    assert module_of(node) == ""
    assert where(node) == "add (add)"


def test_a_graph_without_fake_values_has_a_mode_too() -> None:
    graph = Graph()
    graph.output(())
    assert isinstance(fake_mode_of(GraphModule({}, graph)), torch._subclasses.FakeTensorMode)
