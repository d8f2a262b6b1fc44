"""Channels before and after smoothing, as numbers."""

from typing import Any

import pytest
import torch
from graphs import GatedMLP, captured

from qcompile import passes
from qcompile.calibration import Calibration
from qcompile.config import Config
from qcompile.explanation import explained_passes
from qcompile.pass_pipeline import Pipeline
from qcompile.passes.find_linears import info_of, linears
from qcompile.recording import calibrate
from qcompile.reporting.channels import ChannelReader, binned
from qcompile.validate import graph_inputs


def outlying() -> tuple[GatedMLP, torch.Tensor]:
    torch.manual_seed(0)
    model = GatedMLP().eval().requires_grad_(False)
    model.norm.weight[3] = 50.0
    return model, torch.randn(9, 16)


def reader(**options: Any) -> tuple[ChannelReader, GatedMLP, Calibration, torch.fx.GraphModule, Any]:
    model, x = outlying()
    calibration = calibrate(model, [{"x": x}])
    config = Config(calibrate=1, **options)
    one = captured(model, x)
    gm, _ = Pipeline(passes.quantizing(config).passes[: explained_passes(config)]).run(one.graph)
    found = ChannelReader(gm, one.args, calibration.statistic, config.torch_dtype)
    return found, model, calibration, gm, one


def test_channels_are_what_the_smoothed_graph_computes_with() -> None:
    found, model, calibration, gm, one = reader()
    channels = found.channels()
    assert list(channels) == ["gate_proj", "up_proj", "down_proj"]
    gate = channels["gate_proj"]
    weight = model.gate_proj.weight
    assert torch.equal(gate.w_before, weight.abs().amax(0))
    assert torch.equal(gate.x_before, calibration.statistic(weight, "gate_proj.weight", "absmax"))
    # The float linears of the smoothed graph, run: what they read is what the report says they read.
    seen: dict[str, torch.Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n in linears(gm):
                seen[info_of(n).name] = self.env[n.args[0]].abs().amax(0)
            return value

    Watch(gm).run(*graph_inputs(gm, one.args, calibration.statistic))
    for name, values in channels.items():
        torch.testing.assert_close(values.x_after, seen[name], rtol=1e-4, atol=1e-6)


def test_smoothing_moves_the_outlier_into_the_weight() -> None:
    gate = reader()[0].channels()["gate_proj"]
    assert gate.x_before.argmax() == 3
    assert gate.w_after.argmax() == 3
    assert gate.x_before.max() / gate.x_before.median() > 5 * gate.x_after.max() / gate.x_after.median()
    assert gate.factor == pytest.approx(float((gate.x_before / gate.x_after).max()))
    assert gate.weight_scale > 0


def test_groups_have_members_sizes_and_alpha() -> None:
    found = reader(alpha=0.7)[0]
    channels = found.channels()
    groups = {group.linears: group for group in found.groups()}
    assert set(groups) == {("gate_proj", "up_proj"), ("down_proj",)}
    assert {group.alpha for group in groups.values()} == {0.7}
    assert groups[("gate_proj", "up_proj")].components == 16
    assert channels["down_proj"].alphas == (0.7,)


def test_the_alpha_that_a_search_chose_is_found_again() -> None:
    found, *_ = reader(alpha="auto")
    channels = found.channels()
    chosen = {group.linears: group.alpha for group in found.groups()}
    assert chosen[("gate_proj", "up_proj")] in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    for name, values in channels.items():
        alone = reader(alpha=values.alphas[0] or 0.0)[0].channels()[name]
        if values.alphas[0] is not None:
            torch.testing.assert_close(values.x_after, alone.x_after)


def test_without_smoothing_nothing_moves() -> None:
    found, *_ = reader(alpha=None)
    for values in found.channels().values():
        assert torch.equal(values.x_before, values.x_after)
        assert torch.equal(values.w_before, values.w_after)
        assert values.alphas == ()
        assert values.factor == 1.0
    assert found.groups() == []


def test_bins_are_maxima() -> None:
    values = torch.tensor([1.0, 5.0, 2.0, 3.0, 9.123456])
    assert binned(values, 8) == [1.0, 5.0, 2.0, 3.0, 9.12]
    assert binned(values, 2) == [5.0, 9.12]
    assert binned(values, 3) == [5.0, 3.0, 9.12]
