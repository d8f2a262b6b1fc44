"""Replacing linears: block by block the same numbers as at once, and every float weight let go."""

import gc
import weakref

import pytest
import torch
from checkpoints import IDS, llama
from graphs import BrokenUp, GatedMLP

import qcompile
from qcompile import linear_replacement, ops
from qcompile.quantized_linear import quantized_linears


def test_blocks_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 5, 16)
    torch.manual_seed(1)
    whole = qcompile.quantize(GatedMLP().eval(), [x])
    monkeypatch.setattr(ops, "BLOCK", 3 * 16)
    torch.manual_seed(1)
    blocks = qcompile.quantize(GatedMLP().eval(), [x])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, blocks.state_dict()[name]), name


def test_unsmoothed_weights_are_those_of_the_operator() -> None:
    model = GatedMLP().eval()
    weight = model.gate_proj.weight.detach().clone()
    qcompile.quantize(model, [torch.randn(2, 16)], alpha=None)
    q, scale = ops.quantize(weight, [], "row", torch.int8, torch.float32)
    linear = quantized_linears(model)["gate_proj"]
    assert torch.equal(linear.weight, q)
    assert torch.equal(linear.weight_scale[:, 0], scale)


def test_no_float_weight_is_left() -> None:
    model = llama()
    weights = [weakref.ref(module.weight) for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    qcompile.quantize(model, [IDS])
    gc.collect()
    assert len(weights) == 7
    assert all(weight() is None for weight in weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_cheap_bound_sees_every_value_that_is_not_finite(value: float) -> None:
    weight = torch.randn(8, 4)
    assert linear_replacement._is_small_enough(weight, [torch.ones(4), torch.ones(8, 1)], torch.float16)
    weight[3, 2] = value
    assert not linear_replacement._is_small_enough(weight, [], torch.float32)


def test_the_cheap_bound_is_a_bound() -> None:
    assert not linear_replacement._is_small_enough(
        torch.full((2, 2), 300.0), [torch.tensor([1.0, 400.0])], torch.float16
    )


def test_float_weights_that_two_graphs_read_go_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BrokenUp(after=lambda model, h: model.first(h)).eval()
    weights = [weakref.ref(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)]
    left: list[int] = []
    monkeypatch.setattr(linear_replacement, "give_back", lambda: left.append(sum(w() is not None for w in weights)))
    qcompile.quantize(model, [torch.randn(4, 16)])
    assert left == [3, 2, 1, 0]


def test_a_weight_that_modules_in_two_graphs_share_goes_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BrokenUp().eval()
    model.second.fc1.weight = model.first.fc1.weight
    shared = weakref.ref(model.first.fc1.weight)
    left: list[bool] = []
    monkeypatch.setattr(linear_replacement, "give_back", lambda: left.append(shared() is not None))
    qcompile.quantize(model, [torch.randn(4, 16)], alpha=None)
    assert left == [True, True, False, False]  # the first block's two linears, then the second's
    assert quantized_linears(model).keys() == {f"{part}.{fc}" for part in ("first", "second") for fc in ("fc1", "fc2")}
