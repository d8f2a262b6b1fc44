"""Capture: one functional ATen graph per call, with every input named."""

import gc
import logging
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from compiling import run_python
from graphs import Attention, GatedMLP, PostNorm, ReluMLP, captured, count
from tolerances import assert_close
from torch import Tensor, nn
from torch.fx import GraphModule

import qcompile
from qcompile import backend
from qcompile.capture import capture, capture_call, capture_in_fewest_graphs, raising
from qcompile.captured import Captured
from qcompile.errors import CaptureError
from qcompile.rewrite import input_of

aten = torch.ops.aten


def records(graph: GraphModule) -> list[tuple[str, str]]:
    inputs = [input_of(node) for node in graph.graph.find_nodes(op="placeholder")]
    assert [record.index for record in inputs] == list(range(len(inputs)))
    return [(record.kind, record.name) for record in inputs]


@pytest.mark.parametrize("kind", [GatedMLP, Attention, PostNorm, ReluMLP])
def test_the_graph_computes_what_the_model_does(kind: type[nn.Module]) -> None:
    model, x = kind().eval(), torch.randn(2, 5, 16)
    graph = captured(model, x)
    with torch.no_grad():
        (y,) = graph.graph(*graph.args)
        assert_close("rewrite/float32", actual=y, expected=model(x))


@pytest.mark.parametrize("kind", [GatedMLP, Attention, PostNorm, ReluMLP])
def test_every_parameter_is_an_input_under_its_name(kind: type[nn.Module]) -> None:
    model = kind()
    graph = captured(model, torch.randn(2, 5, 16))
    inputs = records(graph.graph)
    assert {name for kind, name in inputs if kind == "parameter"} == {name for name, _ in model.named_parameters()}
    assert len([kind for kind, _ in inputs if kind == "activation"]) == 1
    for (role, name), value in zip(inputs, graph.args, strict=True):
        if role == "parameter":
            assert value is model.get_parameter(name)


@pytest.mark.parametrize("kind", [GatedMLP, Attention, PostNorm, ReluMLP])
def test_the_graph_is_functional_and_annotated(kind: type[nn.Module]) -> None:
    graph = captured(kind(), torch.randn(2, 5, 16)).graph
    for node in graph.graph.nodes:
        if node.op == "output":
            continue
        assert "val" in node.meta
        assert not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)


def test_what_passes_look_for_stays_whole() -> None:
    graph = captured(PostNorm(), torch.randn(2, 5, 16)).graph
    assert count(graph, aten.native_layer_norm.default) == 2
    assert count(graph, aten.gelu.default) == 1
    assert count(graph, aten.addmm.default) == 2
    assert count(captured(GatedMLP(), torch.randn(2, 5, 16)).graph, aten.silu.default) == 1


@pytest.mark.parametrize("rows", [1, 2])
def test_a_single_row_keeps_its_linears(rows: int) -> None:
    """Inductor's table rewrites products with M = 1; then there would be nothing to quantize when decoding."""
    graph = captured(GatedMLP(), torch.randn(rows, 16), dynamic=False).graph
    assert count(graph, aten.mm.default) == 3


def test_tied_weights_arrive_once() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    names = [name for kind, name in records(captured(model, torch.randn(2, 16)).graph) if kind == "parameter"]
    assert sorted(names) == ["0.bias", "0.weight", "2.bias"]


def test_dynamic_shapes_are_symbolic() -> None:
    graph = captured(ReluMLP(), torch.randn(3, 16), dynamic=True).graph
    activations = [n for n in graph.graph.find_nodes(op="placeholder") if input_of(n).kind == "activation"]
    rows = [node.meta["val"].shape[0] for node in activations if isinstance(node.meta["val"], Tensor)]
    assert [type(size) for size in rows] == [torch.SymInt]


class Cached(nn.Module):
    """Writes into a buffer and into an argument, as KV caches do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("cache", torch.zeros(3, 4))
        self.register_buffer("table", torch.ones(4))

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        y = self.fc(x) * self.table
        self.cache[0] = y[0]
        given.add_(y)
        return self.cache + given[:3]


def test_cache_writes_stay_in_the_graph() -> None:
    model, given = Cached(), torch.zeros(3, 4)
    graph = captured(model, torch.randn(3, 4), given)
    assert count(graph.graph, aten.copy_.default) == 2
    by_name = {name: kind for kind, name in records(graph.graph)}
    assert by_name["cache"] == "activation"
    assert by_name["table"] == "parameter"
    assert model.cache[0].any()
    assert given.any()


class Broken(nn.Module):
    """Two layers and a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ReluMLP(), ReluMLP()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_a_graph_break_gives_two_graphs_with_full_names() -> None:
    model = Broken()
    found = capture_call(model.eval(), {"x": torch.randn(2, 16)})
    assert len(found) == 2
    for graph, prefix in zip(found, ("first", "second"), strict=True):
        names = {name for kind, name in records(graph.graph) if kind == "parameter"}
        assert names == {f"{prefix}.{name}" for name, _ in model.first.named_parameters()}
        assert not graph.graph.meta["whole_model"]


@pytest.mark.parametrize("unused", [False, True])
def test_a_whole_model_is_known_as_such(unused: bool) -> None:
    model = ReluMLP()
    model.extra = nn.Linear(2, 2) if unused else None
    found: list[bool] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def build(traced: GraphModule) -> Callable[[list[Any]], Any]:
            found.append(traced.meta["whole_model"])
            return raising(CaptureError("seen"))

        return capture(gm, inputs, build)

    with torch.no_grad(), pytest.raises(CaptureError, match="seen"):
        torch.compile(model, backend=backend)(torch.randn(2, 16))
    assert found == [not unused]


def test_captures_do_not_use_up_recompilations() -> None:
    model, x = ReluMLP().eval(), torch.randn(2, 16)
    limit = torch._dynamo.config.recompile_limit
    for _ in range(limit + 2):
        (only,) = capture_call(model, {"x": x})
        assert isinstance(only, Captured)


def test_a_capture_does_not_keep_the_model_alive() -> None:
    model = ReluMLP()
    captured(model, torch.randn(2, 16))
    torch._dynamo.reset()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_inputs_that_overlap_are_refused() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x.mul_(2)
            return self.fc(x) + self.fc(y)

    base = torch.randn(3, 4)
    with pytest.raises(CaptureError, match="every graph input must arrive as it was passed") as caught:
        captured(Writes(), base[:2], base[1:])
    assert "\n" not in str(caught.value)


def test_a_raising_callable_raises_the_same_error_again() -> None:
    call = raising(CaptureError("no"))
    lengths = []
    for _ in range(3):
        with pytest.raises(CaptureError, match="^no$") as caught:
            call([1, 2])
        lengths.append(len(traceback.format_exception(caught.value)))
    assert lengths[0] == lengths[2]


def test_pooling_is_captured_in_a_fresh_process() -> None:
    """Inductor's decomposition of it refers to a module that nothing else may have imported."""
    source = (
        "import torch; from qcompile.capture import capture_call;"
        "model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.MaxPool2d(2)).eval();"
        "print(len(capture_call(model, {'input': torch.randn(2, 3, 4, 16)})))"
    )
    assert run_python(source).splitlines()[-1] == "1"


def test_what_the_caller_keeps_in_one_place_is_known() -> None:
    """transformers marks a static cache so; without it, CUDA graphs would refuse to write to it."""

    class Cached(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(16, 16)

        def forward(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
            cache.copy_(self.fc(x))
            return self.fc(x)

    cache = torch.zeros(2, 16)
    torch._dynamo.mark_static_address(cache)
    graph = captured(Cached(), torch.randn(2, 16), cache).graph
    records = [node.meta["input"] for node in graph.graph.find_nodes(op="placeholder")]
    activations = [record for record in records if record.kind == "activation"]
    assert sorted(record.fixed for record in activations) == [False, True]
    positions = backend._static_positions(graph)  # a lowered graph keeps the records
    assert [i for i, record in enumerate(records) if record.fixed or record.kind == "parameter"] == positions


class Follows(torch.nn.Module):
    """Two linears, between which `between` looks at data."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.between(self.fc1(x)))


def checks_a_count(h: torch.Tensor) -> torch.Tensor:
    torch._check((h > 0).sum().item() <= h.numel())
    return h


def once() -> Callable[[torch.Tensor], torch.Tensor]:
    """Breaks the graph of the first call only, as transformers does to install hooks."""
    done: list[bool] = []

    def between(h: torch.Tensor) -> torch.Tensor:
        if not done:
            torch._dynamo.graph_break()
            done.append(True)
        return h

    return between


@pytest.mark.parametrize(
    ("between", "graphs", "fewest"),
    [
        (torch.relu, 1, 1),
        (checks_a_count, 3, 1),
        (lambda h: h[h[:, 0] > -100], 3, 1),
        (lambda h: h if h.sum() > 0 else -h, 3, 3),
    ],
    ids=["plain", "number", "size", "branch"],
)
def test_what_data_decides_is_followed_where_it_can_be(
    between: Callable[[torch.Tensor], torch.Tensor], graphs: int, fewest: int
) -> None:
    model, x = Follows(between).eval(), torch.randn(4, 16)
    assert len(capture_call(model, {"x": x})) == graphs
    found = capture_in_fewest_graphs(model, {"x": x})
    assert len(found) == fewest
    assert sum(count(one.graph, aten.addmm.default) for one in found) == 2


def test_what_a_first_call_does_once_breaks_nothing() -> None:
    model, x = Follows(once()).eval(), torch.randn(4, 16)
    assert len(capture_in_fewest_graphs(model, {"x": x})) == 1


class Shared(torch.nn.Module):
    """Layers that are called through one code object, as transformers' decorators are, which breaks graphs."""

    FUNCTIONS = (
        torch.relu, torch.tanh, torch.sin, torch.cos, torch.abs, torch.neg, torch.exp, torch.erf, torch.square,
        torch.atan, torch.floor, torch.sigmoid,
    )  # fmt: skip

    def __init__(self, layers: int = len(FUNCTIONS)) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(layers))
        pairs = zip(self.FUNCTIONS, self.layers, strict=False)
        self.calls = [self.decorated(lambda x, f=f, layer=layer: layer(f(x))) for f, layer in pairs]

    @staticmethod
    def decorated(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def wrapper(x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return function(x)

        return wrapper

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for call in self.calls:
            x = call(x)
        return x


@pytest.mark.parametrize("compiled_before", [False, True])
def test_code_that_many_layers_share_is_captured_in_all_of_them(compiled_before: bool) -> None:
    """Dynamo compiles it 8 times, and from then on runs it uncompiled, with all that it calls."""
    torch._dynamo.reset()
    model, x = Shared().eval().requires_grad_(False), torch.randn(4, 16)
    if compiled_before:
        torch.compile(model, backend="eager")(x)
    found = capture_call(model, {"x": x})
    weights = {id(value) for one in found for value in one.args if isinstance(value, nn.Parameter) and value.ndim == 2}
    assert sum(count(one.graph, aten.addmm.default) for one in found) == len(weights) == len(Shared.FUNCTIONS)


@pytest.mark.parametrize(
    "analyse",
    [lambda model, x: capture_call(model, {"x": x}), lambda model, x: qcompile.calibrate(model, [x, x])],
    ids=["capture", "calibrate"],
)
def test_analysis_does_not_use_up_what_the_users_calls_may_compile(analyse: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    model, x = Shared(6).eval().requires_grad_(False), torch.randn(4, 16)
    compiled: list[int] = []

    def keeps_count(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled.append(1)
        return gm.forward

    before = torch.compile(model, backend=keeps_count)
    before(x)
    assert len(compiled) == 6
    for _ in range(2):
        analyse(model, x)
    torch.compile(model, backend=keeps_count)(x)
    assert len(compiled) == 12


@pytest.mark.parametrize("level", [logging.WARNING, logging.INFO])
def test_dynamos_advice_is_kept_back_unless_asked_for(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("torch._dynamo")
    monkeypatch.setattr(log, "level", level)
    advice = logging.getLogger("torch._dynamo.variables.tensor")
    seen: list[bool] = []

    class Looks(nn.Module):
        @torch.compiler.disable
        def forward(self, x: Tensor) -> Tensor:
            seen.append(advice.isEnabledFor(logging.WARNING))
            return x

    capture_call(nn.Sequential(nn.Linear(16, 16), Looks()).eval(), {"input": torch.randn(4, 16)})
    assert seen == [level == logging.INFO]
    assert log.level == level
    assert advice.isEnabledFor(logging.WARNING)
