"""Passes and lowering as one function of a captured graph and a config."""

import pytest
import torch
from graphs import GatedMLP, captured
from torch import nn

from qcompile import ops
from qcompile.capture import Around
from qcompile.config import Config
from qcompile.errors import ConfigError, LoweringError
from qcompile.stages import device_of, first_device, guards_of, to_stages


def test_a_quantized_run() -> None:
    gm = captured(GatedMLP(), torch.randn(2, 5, 16)).graph
    stages = to_stages(Config(inner="eager"), gm)
    assert stages.observed is None
    assert stages.quantized is not None
    assert stages.partition is not None
    products = stages.quantized.graph.find_nodes(op="call_function", target=ops.scaled_mm)
    assert len(products) == len(stages.kernels) == 2  # gate and up are one
    assert stages.around == Around()
    assert not any(node.target in ops.REFERENCES for node in stages.partition.run.graph.nodes)


def test_a_run_that_calibrates_first_has_both_graphs() -> None:
    gm = captured(GatedMLP(), torch.randn(2, 5, 16)).graph
    stages = to_stages(Config(inner="eager", calibrate=1), gm)
    assert stages.observed is not None
    assert stages.partition is not None


def test_a_run_that_only_observes_is_not_lowered() -> None:
    gm = captured(GatedMLP(), torch.randn(2, 5, 16)).graph
    stages = to_stages(Config(inner="eager"), gm, observe_only=True)
    assert stages.observed is not None
    assert (stages.quantized, stages.partition, stages.kernels) == (None, None, {})


def test_a_model_without_linears_or_weights() -> None:
    with pytest.raises(ConfigError, match="has no linear layers"):
        to_stages(Config(inner="eager"), captured(nn.LayerNorm(16), torch.randn(2, 16)).graph)
    gm = captured(GatedMLP(), torch.randn(2, 5, 16)).graph
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta["val"] = node.meta["val"].to("meta")
    with pytest.raises(LoweringError, match="on the meta device"):
        to_stages(Config(inner="eager"), gm)


def test_the_device_is_the_first_that_is_no_cpu() -> None:
    cpu, meta = torch.empty(1), torch.empty(1, device="meta")
    assert first_device([3, cpu, meta]).type == "meta"
    assert first_device([cpu]).type == first_device([]).type == "cpu"
    assert device_of(captured(GatedMLP(), torch.randn(2, 5, 16)).graph).type == "cpu"


def test_guards_are_counted() -> None:
    gm = captured(GatedMLP(), torch.randn(2, 5, 16), dynamic=True).graph
    before = guards_of(gm)
    size = next(
        node.meta["val"] for node in gm.graph.find_nodes(op="placeholder") if isinstance(node.meta["val"], torch.SymInt)
    )
    assert size != 12345
    assert guards_of(gm) == before + 1
