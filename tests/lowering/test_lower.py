"""Lowering: no dialect op is left on the run side, kernels are the target's, numbers stay."""

from typing import Any

import pytest
import torch
from graphs import Attention, GatedMLP, PostNorm, ReluMLP, captured, in_two_steps, outputs
from tolerances import assert_close, row_for
from torch.fx.experimental.proxy_tensor import make_fx

import qcompile.passes as passes
from qcompile import ops
from qcompile.config import Config
from qcompile.dump import graph_text
from qcompile.lowering import scaled_mm_int8_cpu
from qcompile.lowering.inductor import decompositions
from qcompile.lowering.lower import lower
from qcompile.lowering.target import Target, detect
from qcompile.lowering.tiles import Row, Table, Tile
from qcompile.rewrite import is_view, static_nodes
from qcompile.verify import check_metadata

HERE = detect(torch.device("cpu"))
VNNI = Target("cpu", 0, frozenset({"avx512_vnni"}))
AVX2 = Target("cpu", 0, frozenset({"avx_vnni"}))


@pytest.mark.parametrize("model", [GatedMLP, Attention, ReluMLP])
@pytest.mark.parametrize(("target", "kernel"), [(VNNI, "vnni"), (AVX2, "int8_cpu"), (Target("cpu"), "int8_float")])
def test_lowered_graph_computes_the_same(model: type[torch.nn.Module], target: Target, kernel: str) -> None:
    if "avx512_vnni" in target.features - HERE.features:
        pytest.skip("this processor has no AVX512-VNNI")
    if kernel == "int8_cpu" and (reason := scaled_mm_int8_cpu.runs_on(target)):
        pytest.skip(reason)
    torch.manual_seed(0)
    capture = captured(model(), torch.randn(2, 5, 16))
    quantized, _ = passes.quantizing(Config(calibrate=1)).run(capture.graph)
    lowered, chosen = lower(quantized, target, decompositions())
    assert set(chosen.values()) == {kernel}
    assert len(chosen) == len(quantized.graph.find_nodes(op="call_function", target=ops.scaled_mm))
    static = static_nodes(lowered)
    left = [node for node in lowered.graph.nodes if node.target in ops.REFERENCES and node not in static]
    assert left == []
    for expected, actual in zip(outputs(quantized, capture), outputs(lowered, capture), strict=True):
        assert_close("rewrite/float32", actual=actual, expected=expected)


@pytest.mark.parametrize(("target", "kernel"), [(HERE, ""), (AVX2, "int8_cpu"), (Target("cpu"), "int8_float")])
def test_products_in_two_steps_are_the_same_to_the_bit(target: Target, kernel: str) -> None:
    if kernel == "int8_cpu" and (reason := scaled_mm_int8_cpu.runs_on(target)):
        pytest.skip(reason)
    capture = captured(GatedMLP(), torch.randn(2, 5, 16))
    quantized, _ = passes.quantizing(Config(calibrate=1)).run(capture.graph)
    apart, chosen = lower(in_two_steps(quantized), target, decompositions())
    assert set(chosen.values()) == {kernel} if kernel else "vnni" not in chosen.values()
    static = static_nodes(apart)
    assert [node for node in apart.graph.nodes if node.target in ops.REFERENCES and node not in static] == []
    whole, _ = lower(quantized, target, decompositions())
    for expected, actual in zip(outputs(whole, capture), outputs(apart, capture), strict=True):
        assert torch.equal(actual, expected)


def test_inputs_keep_their_records_and_constants_their_values() -> None:
    capture = captured(GatedMLP(), torch.randn(2, 5, 16))
    quantized, _ = passes.quantizing(Config(calibrate=1)).run(capture.graph)
    lowered, _ = lower(quantized, HERE, decompositions())
    before, after = (
        [node.meta["input"] for node in gm.graph.find_nodes(op="placeholder")] for gm in (quantized, lowered)
    )
    assert before == after
    for node in lowered.graph.find_nodes(op="get_attr"):
        value = getattr(lowered, str(node.target))
        assert not isinstance(value, torch._subclasses.FakeTensor)
        assert value.dtype == torch.int64


def test_lowering_for_a_machine_that_is_not_here() -> None:
    capture = captured(GatedMLP(), torch.randn(2, 5, 16))
    quantized, _ = passes.quantizing(Config()).run(capture.graph)
    for target, kernel in ((90, "triton"), (75, "int_mm"), (70, "int8_float")):
        lowered, chosen = lower(quantized, Target("cuda", target), decompositions())
        assert set(chosen.values()) == {kernel}
        assert not [node for node in lowered.graph.nodes if node.target is ops.scaled_mm]


def test_tiles_that_were_measured_are_taken() -> None:
    pytest.importorskip("triton")
    capture = captured(GatedMLP(), torch.randn(2, 5, 16))
    quantized, _ = passes.quantizing(Config()).run(capture.graph)
    tile = Tile(16, 32, 32, stages=2)
    measured = Table("here", "measured", (Row("int8", 16, 48, 16, tile),))
    lowered, _ = lower(quantized, Target("cuda", 90), decompositions(), measured)
    products = lowered.graph.find_nodes(op="call_function", target=torch.ops.qcompile_triton.scaled_mm.default)
    assert [node.args[8] == [0, *tile.to_ints()] for node in products] == [True, False], "gate and up, down"


@pytest.mark.parametrize("options", [
    {"activations": "tensor"}, {"activations": "static"}, {"dtype": "fp8"}, {"dtype": "fp8_e5m2"},
], ids=str)  # fmt: skip
def test_every_scheme_lowers(options: dict[str, Any]) -> None:
    capture = captured(GatedMLP(), torch.randn(2, 5, 16), dynamic=True)
    quantized, _ = passes.quantizing(Config(calibrate=1, **options)).run(capture.graph)
    lowered, _ = lower(quantized, HERE, decompositions())
    for expected, actual in zip(outputs(quantized, capture, 3.0), outputs(lowered, capture, 3.0), strict=True):
        assert_close("rewrite/float32", actual=actual, expected=expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_keep_their_dtype(dtype: torch.dtype) -> None:
    capture = captured(PostNorm().to(dtype), torch.randn(2, 5, 16, dtype=dtype))
    quantized, _ = passes.quantizing(Config()).run(capture.graph)
    lowered, _ = lower(quantized, HERE, decompositions())
    (expected,), (actual,) = outputs(quantized, capture), outputs(lowered, capture)
    assert_close(row_for("rewrite", dtype), actual=actual, expected=expected)


def test_lowering_leaves_the_quantized_graph_alone() -> None:
    capture = captured(GatedMLP(), torch.randn(2, 5, 16))
    quantized, _ = passes.quantizing(Config()).run(capture.graph)
    before = graph_text(quantized)
    lower(quantized, HERE, decompositions())
    assert graph_text(quantized) == before


def test_weights_are_not_quantized_while_lowering() -> None:
    """Static work stays in the dialect; it runs once, when weights are bound."""
    capture = captured(GatedMLP(), torch.randn(2, 5, 16))
    quantized, _ = passes.quantizing(Config(calibrate=1)).run(capture.graph)
    lowered, _ = lower(quantized, HERE, decompositions())
    static = static_nodes(quantized)
    for target in (ops.quantize, ops.smoothing_scale, ops.rescale):
        expected = [node for node in quantized.graph.find_nodes(op="call_function", target=target) if node in static]
        assert expected
        assert len(lowered.graph.find_nodes(op="call_function", target=target)) == len(expected)


class Stack(torch.nn.Module):
    """Layers alike."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(GatedMLP() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_operator_is_traced_once_for_all_layers(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        traces[-1] += 1
        return make_fx(*args, **kwargs)

    monkeypatch.setattr("qcompile.lowering.lower.make_fx", counting)
    for count in (2, 5):
        capture = captured(Stack(count), torch.randn(2, 5, 16), dynamic=dynamic)
        quantized, _ = passes.quantizing(Config(calibrate=1)).run(capture.graph)
        traces.append(0)
        lowered, _ = lower(quantized, HERE, decompositions())
        for expected, actual in zip(outputs(quantized, capture), outputs(lowered, capture), strict=True):
            assert_close("rewrite/float32", actual=actual, expected=expected)
    assert traces[0] == traces[1] > 5


class Layouts(torch.nn.Module):
    """One softmax of two layouts, an operator with two results, and a view of what a view may not take."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first = torch.nn.LayerNorm(16), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(self.norm(x))
        both = y.softmax(-1) + y.transpose(0, 1).softmax(-1).transpose(0, 1)
        return both.split(8, -1)[1] + self.norm(both)[..., :8]


@pytest.mark.parametrize("model", [Layouts, Attention, PostNorm])
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_node_says_the_truth(model: type[torch.nn.Module], dynamic: bool) -> None:
    """Inductor plans memory by sizes and strides, and decides by shared storage what may be written in place."""
    capture = captured(model(), torch.randn(3, 5, 16), dynamic=dynamic)
    quantized, _ = passes.quantizing(Config()).run(capture.graph)
    lowered, _ = lower(quantized, HERE, decompositions())
    check_metadata(lowered)
    storages: dict[int, Any] = {}
    for node in lowered.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        storage = value.untyped_storage()._cdata
        base = storages.setdefault(storage, node)
        assert base is node or (is_view(node) and base in _above(node))
    for expected, actual in zip(outputs(quantized, capture), outputs(lowered, capture), strict=True):
        assert_close("rewrite/float32", actual=actual, expected=expected)


def _above(node: Any) -> set[Any]:
    found = set(node.all_input_nodes)
    for operand in node.all_input_nodes:
        found |= _above(operand)
    return found
