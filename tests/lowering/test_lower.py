"""Lowering: no dialect op is left on the run side, kernels are the target's, numbers stay."""

import pytest
import torch
from graphs import Attention, GatedMLP, ReluMLP, captured, outputs
from tolerances import assert_close

import qcompile.passes as passes
from qcompile import ops
from qcompile.config import Config
from qcompile.lowering.inductor import decompositions
from qcompile.lowering.lower import lower
from qcompile.lowering.target import Target
from qcompile.rewrite import static_nodes

VNNI = Target("cpu", 0, frozenset({"avx512_vnni"}))


@pytest.mark.parametrize("model", [GatedMLP, Attention, ReluMLP])
@pytest.mark.parametrize(("target", "kernel"), [(VNNI, "int8_cpu"), (Target("cpu"), "reference")])
def test_lowered_graph_computes_the_same(model: type[torch.nn.Module], target: Target, kernel: str) -> None:
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


def test_inputs_keep_their_records_and_constants_their_values() -> None:
    capture = captured(GatedMLP(), torch.randn(2, 5, 16))
    quantized, _ = passes.quantizing(Config(calibrate=1)).run(capture.graph)
    lowered, _ = lower(quantized, VNNI, decompositions())
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
    _, chosen = lower(quantized, Target("cuda", 90), decompositions())
    assert set(chosen.values()) == {"reference"}
