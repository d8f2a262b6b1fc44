"""Prepared weights: one copy for all graphs, computed from the weights as they are."""

import gc
import weakref
from typing import Any

import pytest
import torch
from graphs import ReluMLP, captured
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from qcompile import names, ops, passes, weights
from qcompile.captured import Captured
from qcompile.config import Config
from qcompile.errors import WeightError
from qcompile.lowering.inductor import decompositions
from qcompile.lowering.lower import lower
from qcompile.lowering.partition import Partition, Prepared, partition
from qcompile.lowering.target import detect
from qcompile.weights import Binding, WeightStore, evaluate


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> WeightStore:
    fresh = WeightStore()
    monkeypatch.setattr(weights, "STORE", fresh)
    return fresh


def ones(weight: Tensor, name: str, field: str) -> Tensor:
    return ABSMAX.setdefault(weight.shape[1], torch.ones(weight.shape[1]))


ABSMAX: dict[int, Tensor] = {}


def prepared(graph: Captured, **options: Any) -> Partition:
    quantized, _ = passes.quantizing(Config(calibrate=1, **options)).run(graph.graph)
    lowered, _ = lower(quantized, detect(torch.device("cpu")), decompositions())
    return partition(lowered)


def parameters(part: Partition, args: list[Any]) -> list[Tensor]:
    return [args[index] for index in part.parameters]


def bind(part: Partition, args: list[Any]) -> Binding:
    return Binding(part, parameters(part, args), ones, args)


@pytest.fixture
def graph() -> Captured:
    return captured(ReluMLP(), torch.randn(2, 16))


def test_two_graphs_of_one_model_share_tensors(store: WeightStore) -> None:
    model = ReluMLP()
    first, second = captured(model, torch.randn(2, 16)), captured(model, torch.randn(3, 5, 16))
    one = bind(prepared(first), first.args)
    computed = store.computed
    assert computed == len(one.values)
    two = bind(prepared(second), second.args)
    assert store.computed == computed
    assert {value.data_ptr() for value in one.values} == {value.data_ptr() for value in two.values}


def test_statistics_recorded_in_16_bits_are_shared_too(store: WeightStore) -> None:
    model = ReluMLP().bfloat16()
    absmax = {16: torch.rand(16).bfloat16(), 24: torch.rand(24).bfloat16()}
    for shape in ((2, 16), (3, 5, 16)):
        graph = captured(model, torch.randn(shape).bfloat16())
        part = prepared(graph)
        binding = Binding(part, parameters(part, graph.args), lambda weight, *_: absmax[weight.shape[1]], graph.args)
        assert store.computed == len(binding.values)


def test_two_models_share_nothing(store: WeightStore) -> None:
    first, second = (captured(ReluMLP(), torch.randn(2, 16)) for _ in range(2))
    one, two = bind(prepared(first), first.args), bind(prepared(second), second.args)
    assert store.computed == len(one.values) + len(two.values)
    assert not {value.data_ptr() for value in one.values} & {value.data_ptr() for value in two.values}


def test_other_options_share_nothing_that_depends_on_them(store: WeightStore, graph: Captured) -> None:
    one = bind(prepared(graph, alpha=0.5), graph.args)
    two = bind(prepared(graph, alpha=0.6), graph.args)
    assert store.computed == len(one.values) + len(two.values)


def test_prepared_tensors_go_with_their_last_binding(store: WeightStore, graph: Captured) -> None:
    part = prepared(graph)
    binding = bind(part, graph.args)
    assert len(store._kept) == len(binding.values)
    again = bind(part, graph.args)
    del binding
    assert len(store._kept) == len(again.values)
    del again
    assert not store._kept


def test_a_binding_fits_its_parameters_only(graph: Captured) -> None:
    part = prepared(graph)
    binding, live = bind(part, graph.args), parameters(part, graph.args)
    assert binding.fits(live)
    assert not binding.fits([nn.Parameter(p.detach().clone()) for p in live])
    assert not binding.fits([live[1], live[0], *live[2:]])
    alias = nn.Parameter(live[0].detach(), requires_grad=False)
    assert alias.data_ptr() == live[0].data_ptr()
    assert not binding.fits([alias, *live[1:]]), "another tensor over the same memory, which may be laid out otherwise"


@pytest.mark.parametrize("position", range(5))
def test_a_write_to_any_parameter_ends_the_fit(position: int, graph: Captured) -> None:
    part = prepared(graph)
    binding, live = bind(part, graph.args), parameters(part, graph.args)
    with torch.no_grad():
        live[position].mul_(2)
    assert not binding.fits(live)


@pytest.mark.parametrize("is_kept", [False, True], ids=["", "the old data lives on"])
@pytest.mark.parametrize("position", range(5))
def test_replaced_data_ends_the_fit(position: int, is_kept: bool, graph: Captured) -> None:
    part = prepared(graph)
    binding, live = bind(part, graph.args), parameters(part, graph.args)
    old = live[position].data if is_kept else None
    live[position].data = live[position].data.clone()
    assert not binding.fits(live)
    del old


def test_a_dead_parameter_ends_the_binding() -> None:
    graph = captured(ReluMLP(), torch.randn(2, 16))
    torch._dynamo.reset()
    binding = bind(prepared(graph), graph.args)
    assert binding.alive()
    graph.args.clear()
    gc.collect()
    assert not binding.alive()


def test_what_was_made_of_a_dead_parameter_goes_with_it(store: WeightStore) -> None:
    """The rest stays: another parameter in its place needs only its own part anew."""
    model = ReluMLP()
    graph = captured(model, torch.randn(2, 16))
    torch._dynamo.reset()
    binding = bind(prepared(graph), graph.args)
    count = len(binding.values)
    model.fc1.weight = nn.Parameter(torch.randn(24, 16))
    position = next(i for i, arg in enumerate(graph.args) if isinstance(arg, nn.Parameter) and arg.shape == (24, 16))
    graph.args[position] = None
    gc.collect()
    gone = [value for value in binding.values if value is None]
    assert 0 < len(gone) < count
    assert len(store._kept) == count - len(gone)
    graph.args.clear()
    del model
    gc.collect()
    assert binding.values == [None] * count
    assert not store._kept


def test_refresh_ends_every_fit(store: WeightStore, graph: Captured) -> None:
    part = prepared(graph)
    binding, live = bind(part, graph.args), parameters(part, graph.args)
    weights.refresh()
    assert not binding.fits(live)
    computed = store.computed
    assert bind(part, graph.args).fits(live)
    assert store.computed == 2 * computed


def test_a_new_parameter_at_an_old_address_is_not_mistaken(store: WeightStore) -> None:
    """Same expression, address, id and version: only the reference to the tensor tells them apart."""
    graph = captured(ReluMLP(), torch.randn(2, 16))
    part = prepared(graph)
    binding = bind(part, graph.args)
    key, kept = next(iter(store._kept.items()))
    others = tuple(weakref.ref(torch.zeros(1)) for _ in kept.leaves)
    store._kept[key] = weights._Kept(kept.value, others, kept.memories)
    before = store.computed
    again = bind(part, graph.args)
    assert store.computed == before + 1
    assert sum(a is not b for a, b in zip(binding.values, again.values, strict=True)) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["fc1.weight", "fc2.weight", "norm.weight", "fc1.bias"])
def test_weights_that_are_not_finite_are_named(name: str, value: float) -> None:
    model = ReluMLP()
    graph = captured(model, torch.randn(2, 16))
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    with pytest.raises(WeightError, match=f"weights must be finite; {name} has NaN or Inf"):
        bind(prepared(graph), graph.args)


def test_a_graph_used_for_another_layer_names_that_layer() -> None:
    layers = nn.ModuleList(ReluMLP() for _ in range(2))
    graph = captured(layers[0], torch.randn(2, 16))
    names.register(layers)
    by_name = dict(layers[0].named_parameters())
    for position, arg in enumerate(graph.args):
        for name, parameter in by_name.items():
            if arg is parameter:
                graph.args[position] = layers[1].get_parameter(name)
    with torch.no_grad():
        layers[1].fc2.weight[0, 0] = torch.nan
    with pytest.raises(WeightError, match=r"weights must be finite; 1\.fc2\.weight has NaN or Inf"):
        bind(prepared(graph), graph.args)


def test_a_fold_that_overflows_is_named() -> None:
    model = ReluMLP().half()
    graph = captured(model, torch.randn(2, 16).half())
    with torch.no_grad():
        model.norm.weight.fill_(6e4)
    part = prepared(graph)
    with pytest.raises(WeightError, match=r"a scale folded into a parameter must stay finite; norm\.weight overflowed"):
        Binding(part, parameters(part, graph.args), lambda weight, *_: torch.full(weight.shape[1:], 1e-3), graph.args)


def test_statistics_are_asked_for_by_the_live_name() -> None:
    layers = nn.ModuleList(ReluMLP() for _ in range(2))
    graph = captured(layers[1], torch.randn(2, 16))
    names.register(layers)
    asked: list[tuple[str, bool]] = []

    def statistic(weight: Tensor, name: str, field: str) -> Tensor:
        asked.append((name, weight is layers.get_parameter(name)))
        return torch.ones(weight.shape[1])

    part = prepared(graph)
    Binding(part, parameters(part, graph.args), statistic, graph.args)
    assert sorted(asked) == [("1.fc1.weight", True), ("1.fc2.weight", True)]


def arithmetic() -> tuple[GraphModule, dict[str, Any]]:
    """p, q → a = p + q, b = a · 2, c = q · 3, bad = an operator that must not run."""
    graph = Graph()
    p, q = graph.placeholder("p"), graph.placeholder("q")
    nodes = {"a": graph.call_function(torch.add, (p, q))}
    nodes["b"] = graph.call_function(torch.mul, (nodes["a"], 2))
    nodes["c"] = graph.call_function(torch.mul, (q, graph.get_attr("three")))
    nodes["bad"] = graph.call_function(torch.linalg.inv, (p,))
    graph.output(tuple(nodes.values()))
    root = nn.Module()
    root.register_buffer("three", torch.tensor(3.0))
    return GraphModule(root, graph), nodes


@pytest.mark.parametrize("wanted", [(), ("b",), ("c",), ("a", "b"), ("b", "a", "c"), ("b", "b")], ids=",".join)
def test_evaluate_computes_what_is_wanted_and_no_more(wanted: tuple[str, ...]) -> None:
    gm, nodes = arithmetic()
    inputs = [torch.tensor(1.0), torch.tensor(10.0)]
    found = evaluate(gm, inputs, [nodes[name] for name in wanted])
    assert [value.item() for value in found] == [{"a": 11.0, "b": 22.0, "c": 30.0}[name] for name in wanted]


def test_evaluate_records_no_gradients() -> None:
    gm, nodes = arithmetic()
    (value,) = evaluate(gm, [nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))], [nodes["b"]])
    assert not value.requires_grad


def test_prepared_tensors_are_what_the_dialect_defines(graph: Captured) -> None:
    part = prepared(graph, alpha=None)
    values = bind(part, graph.args).values
    weight = next(p for p in parameters(part, graph.args) if p.shape == (24, 16))
    q, scale = ops.quantize(weight, [], "row", torch.int8)
    assert any(torch.equal(value, q) for value in values if value.dtype == torch.int8)
    assert any(torch.equal(value, scale) for value in values if value.shape == scale.shape)


def merged(*sizes: int, dtype: torch.dtype = torch.int8) -> tuple[Prepared, list[Tensor]]:
    """An entry that concatenates parameters of these many rows, and the parameters."""
    graph = Graph()
    nodes = [graph.placeholder(f"p{i}") for i in range(len(sizes))]
    node = graph.call_function(ops.concatenate, (nodes,))
    leaves: list[Tensor] = [nn.Parameter(torch.randn(size, 4).to(dtype), requires_grad=False) for size in sizes]
    return Prepared(node, "", tuple(range(len(sizes)))), leaves


def test_merged_8_bit_parameters_become_views_of_the_merged_tensor() -> None:
    entry, leaves = merged(3, 5)
    whole = torch.cat(leaves)
    weights.adopt(entry, whole, leaves)
    assert [leaf.data_ptr() for leaf in leaves] == [whole.data_ptr(), whole.data_ptr() + 12]
    again = weights._merged_already(entry, leaves)
    assert again is not None
    assert again.data_ptr() == whole.data_ptr()
    assert torch.equal(again, whole)


def test_parameters_that_share_memory_otherwise_stay_where_they_are() -> None:
    entry, leaves = merged(3, 5)
    leaves[1].data = torch.zeros(9, 4, dtype=torch.int8)[2:7]
    before = [leaf.data_ptr() for leaf in leaves]
    weights.adopt(entry, torch.cat(leaves), leaves)
    assert [leaf.data_ptr() for leaf in leaves] == before
    assert weights._merged_already(entry, leaves) is None


def test_a_parameter_follows_a_state_dict_taken_before() -> None:
    entry, leaves = merged(3, 5)
    taken = leaves[1].detach()
    weights.adopt(entry, torch.cat(leaves), leaves)
    taken.fill_(7)
    assert torch.equal(leaves[1], taken)


def test_memory_shared_with_processes_stays_shared() -> None:
    entry, leaves = merged(3, 5)
    leaves[1].share_memory_()
    weights.adopt(entry, torch.cat(leaves), leaves)
    assert leaves[1].is_shared()


def test_float_parameters_are_not_moved() -> None:
    entry, leaves = merged(3, 5, dtype=torch.float32)
    before = [leaf.data_ptr() for leaf in leaves]
    weights.adopt(entry, torch.cat(leaves), leaves)
    assert [leaf.data_ptr() for leaf in leaves] == before


def test_known_values_are_not_computed_again() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.add, (x, 1))
    z = graph.call_function(torch.mul, (y, 2))
    graph.output((z,))
    gm = GraphModule(nn.Module(), graph)
    assert evaluate(gm, [torch.tensor(3)], [z, y]) == [8, 4]
    assert evaluate(gm, [torch.tensor(3)], [z], {y: torch.tensor(10)}) == [20]
    assert evaluate(gm, [torch.tensor(3)], [y], {y: torch.tensor(10)}) == [10]
