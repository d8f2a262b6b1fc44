"""Statistics as they are recorded: by weight, over calls, anew when a weight changes."""

import gc
from typing import Any

import pytest
import torch
from torch import nn

from qcompile import names
from qcompile.calibration import Recorder
from qcompile.errors import CalibrationError


def test_a_further_use_in_one_call_is_no_further_call() -> None:
    recorder, weight = Recorder(), torch.randn(8, 3)
    for new_call in (True, False, False, True):
        recorder.record(weight, torch.ones(3), torch.zeros(4, 3), new_call=new_call)
    assert recorder.calls(weight) == 2


def test_the_recorder_draws_rows_from_all_calls_alike() -> None:
    recorder, weight = Recorder(), torch.randn(8, 3)
    for call in range(8):
        recorder.record(weight, torch.ones(3), torch.full((400, 3), float(call)))
    rows = recorder.statistic(weight, "w", "rows")
    assert torch.equal(rows, rows[:, :1].expand(400, 3)), "a row is taken whole"
    counts = torch.bincount(rows[:, 0].long(), minlength=8)
    assert counts.min() >= 25
    assert counts.max() <= 75
    again = Recorder()
    for call in range(8):
        again.record(weight, torch.ones(3), torch.full((400, 3), float(call)))
    assert torch.equal(again.statistic(weight, "w", "rows"), rows), "equal data gives equal statistics"


def test_the_recorder_keeps_maxima() -> None:
    recorder, weight = Recorder(), torch.randn(8, 3)
    given = torch.tensor([1.0, 5.0, 2.0])
    recorder.record(weight, given, torch.zeros(4, 3))
    given.zero_()
    recorder.record(weight, torch.tensor([3.0, 4.0, 2.0]), torch.zeros(4, 3))
    assert recorder.calls(weight) == 2
    assert recorder.statistic(weight, "w", "absmax").tolist() == [3, 5, 2]


@pytest.mark.parametrize("write", [lambda w: w.mul_(2), lambda w: w.detach().zero_(), lambda w: w.set_(w.clone())])
def test_the_recorder_starts_again_when_a_weight_changes(write: Any) -> None:
    recorder, weight = Recorder(), torch.randn(8, 3)
    recorder.record(weight, torch.tensor([9.0, 9.0, 9.0]), torch.zeros(4, 3))
    write(weight)
    assert recorder.calls(weight) == 0
    with pytest.raises(CalibrationError, match=r"no activations were recorded for fc\.weight"):
        recorder.statistic(weight, "fc.weight", "absmax")
    recorder.record(weight, torch.tensor([1.0, 1.0, 1.0]), torch.zeros(4, 3))
    assert recorder.calls(weight) == 1
    assert recorder.statistic(weight, "w", "absmax").tolist() == [1, 1, 1]


def test_the_recorder_starts_again_when_data_is_replaced() -> None:
    recorder, weight = Recorder(), nn.Parameter(torch.randn(8, 3))
    recorder.record(weight, torch.ones(3), torch.zeros(4, 3))
    weight.data = torch.randn(8, 3)
    assert recorder.calls(weight) == 0


def test_a_weight_that_changes_at_every_call_is_named_once() -> None:
    recorder, model = Recorder(), nn.Sequential(nn.Linear(3, 8))
    names.register(model)
    weight = model[0].weight

    def call() -> None:
        with torch.no_grad():
            weight.mul_(2)
        recorder.record(weight, torch.ones(3), torch.zeros(4, 3))

    for _ in range(8):
        call()
    with pytest.warns(UserWarning, match=r"^0\.weight changes from call to call, .*; list its linear in ignore$"):
        call()
    for _ in range(20):
        call()


def test_a_weight_that_changes_now_and_then_is_not() -> None:
    recorder, weight = Recorder(), torch.randn(8, 3)
    for _ in range(30):
        weight.mul_(2)
        for _ in range(2):
            recorder.record(weight, torch.ones(3), torch.zeros(4, 3))


def test_the_recorder_does_not_take_a_new_weight_for_a_dead_one() -> None:
    recorder, seen = Recorder(), set()
    for _ in range(50):  # an address is reused soon
        weight = torch.randn(8, 3)
        seen.add(id(weight))
        assert recorder.calls(weight) == 0
        recorder.record(weight, torch.ones(3), torch.zeros(4, 3))
        del weight
    assert len(seen) < 50, "no address was recycled; the test shows nothing"


def test_the_recorder_names_only_living_weights() -> None:
    recorder, kept, lost = Recorder(), nn.Linear(3, 8), nn.Linear(3, 8)
    for name, module in (("kept", kept), ("lost", lost)):
        names.register(nn.ModuleDict({name: module}))
        recorder.record(module.weight, torch.ones(3), torch.zeros(4, 3))
    del lost, module
    gc.collect()
    assert len(recorder._entries) == 1
    assert list(recorder.statistics()) == ["kept.weight"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_not_finite_are_refused(value: float) -> None:
    recorder, model = Recorder(), nn.Sequential(nn.Linear(3, 8))
    names.register(model)
    with pytest.raises(CalibrationError, match=r"the input of 0\.weight has NaN or Inf"):
        recorder.record(model[0].weight, torch.tensor([1.0, value, 1.0]), torch.zeros(4, 3))
    with pytest.raises(CalibrationError, match="the input of an unnamed weight has NaN or Inf"):
        recorder.record(torch.randn(8, 3), torch.tensor([1.0, value, 1.0]), torch.zeros(4, 3))
    assert recorder.calls(model[0].weight) == 0
