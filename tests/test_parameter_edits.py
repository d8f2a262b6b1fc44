"""Parameter edits are checked before the first is written, and need one parameter at a time."""

import copy
from typing import Any

import pytest
import torch
from graphs import GatedMLP, ReluMLP, captured
from torch import Tensor, nn

from qcompile import ops, passes
from qcompile.config import Config
from qcompile.errors import WeightError
from qcompile.grouped_ops import scaled_grouped_mm
from qcompile.parameter_edits import SCALES, ParameterEdits


def edits_of(model: nn.Module, x: Tensor, statistic: Any = None) -> ParameterEdits:
    found = captured(model, x)
    gm, _ = passes.smoothing(Config(calibrate=1, alpha=0.5)).run(found.graph)
    return ParameterEdits(
        gm, found.args, statistic or (lambda weight, name, field: torch.full((weight.shape[1],), 9.0))
    )


def test_writing_leaves_the_function_as_it_is() -> None:
    model, x = GatedMLP().double(), torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    before = copy.deepcopy(model.state_dict())
    edits = edits_of(model, x)
    edits.check()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    edits.write()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert not torch.equal(model.get_parameter("norm.weight"), before["norm.weight"])


def test_scales_come_from_the_parameters_as_they_were() -> None:
    """gate_proj's edit is written before up_proj's: the scale both share must not be computed again."""
    model, x = GatedMLP(), torch.randn(2, 5, 16)
    edits = edits_of(model, x)
    nodes = [node for node in edits.gm.graph.nodes if node.target is ops.smoothing_scale]
    before = [value.clone() for value in edits.values(nodes)]
    edits.write()
    for value, kept in zip(edits.values(nodes), before, strict=True):
        assert torch.equal(value, kept)


class OnePlus(nn.Module):
    """A norm whose gain is stored less one, and the linear that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) - 0.5)
        self.linear = nn.Linear(16, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        y: Tensor = self.linear((normed * (1.0 + self.weight.float())).to(x.dtype))
        return y


@pytest.mark.parametrize("largest", [3e2, 3e3, 3e6])
def test_a_gain_stored_less_one_loses_nothing_to_large_scales(largest: float) -> None:
    model, x = OnePlus().bfloat16(), torch.randn(8, 16).bfloat16()
    with torch.no_grad():
        model.linear.weight.copy_(torch.rand(32, 16) / 16)
    gain, weight = (parameter.detach().double() for parameter in model.parameters())
    ranges = torch.logspace(0, torch.tensor(largest).log10().item(), 16)
    edits = edits_of(model, x, lambda weight, name, field: ranges)
    edits.check()
    edits.write()
    after, scaled = (parameter.detach().double() for parameter in model.parameters())
    scale = (1 + gain) / (1 + after)
    assert scale.max() > 10
    # W' = W · s for the very s that the stored gain means: off by the weight's own rounding to bfloat16, and no more.
    assert ((scaled / (weight * scale) - 1).abs() <= 2**-8).all()


def test_an_overflow_is_found_before_anything_is_written() -> None:
    model, x = ReluMLP().half(), torch.randn(2, 16).half()
    with torch.no_grad():
        model.fc1.weight.fill_(6e4)
    before = copy.deepcopy(model.state_dict())
    ranges = {"fc1.weight": 1e12, "fc2.weight": 1.0}
    edits = edits_of(model, x, lambda weight, name, field: torch.full((weight.shape[1],), ranges[name]))
    with pytest.raises(WeightError, match="must stay finite"):
        edits.check()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_released_arguments_are_let_go() -> None:
    model, x = ReluMLP(), torch.randn(2, 16)
    edits = edits_of(model, x)
    index = next(i for i, value in enumerate(edits.args) if value is model.fc2.weight)
    edits.release(index)
    assert edits.args[index] is None


def test_every_operator_that_makes_scales_is_computed_first() -> None:
    others = (ops.rescale, ops.scaled_mm, scaled_grouped_mm)
    makes_scales = {op for op in ops.REFERENCES if "scale" in str(op) and op not in others}
    assert set(SCALES) == makes_scales
