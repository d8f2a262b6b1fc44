"""Models that calibrate themselves in their first calls, or are given a calibration."""


import pytest
import torch
from compiling import compiled, run
from graphs import GatedMLP, ReluMLP
from tolerances import assert_close

import qcompile
from qcompile.errors import CalibrationError


@pytest.mark.parametrize("calls", [1, 3])
def test_self_calibration_switches_after_n_calls(calls: int) -> None:
    model = GatedMLP()
    call = compiled(model, calibrate=calls)
    data = [torch.randn(4, 16) for _ in range(calls)]
    for x in data:
        assert_close("rewrite/float32", actual=run(call, x), expected=run(model, x))
    x = torch.randn(4, 16)
    y = run(call, x)
    assert not torch.allclose(y, run(model, x), rtol=1e-5)
    assert_close("int8/model", actual=y, expected=run(model, x))
    torch._dynamo.reset()
    fixed = compiled(model, calibration=qcompile.calibrate(model, data))
    assert_close("rewrite/float32", actual=y, expected=run(fixed, x))


def test_self_calibration_counts_calls_of_all_shapes() -> None:
    model = ReluMLP()
    call = compiled(model, calibrate=3)
    for shape in ((2, 16), (3, 16), (2, 2, 16)):
        x = torch.randn(shape)
        assert_close("rewrite/float32", actual=run(call, x), expected=run(model, x))
    for shape in ((2, 16), (3, 16), (2, 2, 16)):
        x = torch.randn(shape)
        assert not torch.allclose(run(call, x), run(model, x), rtol=1e-5)


def test_self_calibration_refuses_what_is_not_finite() -> None:
    model = ReluMLP()
    call = compiled(model, calibrate=1)
    with pytest.raises(CalibrationError, match=r"the input of fc1\.weight has NaN or Inf"):
        run(call, torch.full((2, 16), torch.nan))
    x = torch.randn(2, 16)
    assert_close("rewrite/float32", actual=run(call, x), expected=run(model, x))
    assert not torch.allclose(run(call, x), run(model, x), rtol=1e-5)


def test_a_static_range_of_zero_is_refused() -> None:
    """Every input would saturate at a scale of nothing."""
    model, x = ReluMLP(), torch.randn(2, 16)
    with torch.no_grad():
        model.fc1.bias.fill_(-100)  # relu gives fc2 nothing but zeros
    call = compiled(model, calibrate=1, activations="static")
    run(call, x)
    for _ in range(2):
        with pytest.raises(CalibrationError, match=r"calibration saw only zeros at fc2\.weight; calibrate with data"):
            run(call, x)
    dynamic = compiled(model, calibrate=1)
    for _ in range(2):
        assert_close("int8/model", actual=run(dynamic, x), expected=run(model, x))


def test_each_model_calibrates_itself() -> None:
    first, second = ReluMLP(), ReluMLP()
    calls = compiled(first, calibrate=1), compiled(second, calibrate=1)
    x = torch.randn(4, 16)
    run(calls[0], x)
    assert not torch.allclose(run(calls[0], x), run(first, x), rtol=1e-5)
    assert_close("rewrite/float32", actual=run(calls[1], x * 50), expected=run(second, x * 50))
    for call, model in zip(calls, (first, second), strict=True):
        assert_close("int8/model", actual=run(call, x), expected=run(model, x))


def test_a_changed_weight_is_calibrated_again() -> None:
    model, x = ReluMLP(), torch.randn(4, 16)
    call = compiled(model, calibrate=2)
    for _ in range(3):
        run(call, x)
    with torch.no_grad():
        model.fc1.weight.mul_(3)
    for _ in range(2):
        assert_close("rewrite/float32", actual=run(call, x), expected=run(model, x))
    y = run(call, x)
    assert not torch.allclose(y, run(model, x), rtol=1e-5)
    assert_close("int8/model", actual=y, expected=run(model, x))


def test_a_calibration_of_other_weights_is_refused_at_the_call() -> None:
    model, x = ReluMLP().eval(), torch.randn(4, 16)
    call = compiled(model, calibration=qcompile.calibrate(model, [x]))
    run(call, x)
    with torch.no_grad():
        model.fc2.weight.mul_(2)
    for _ in range(2):
        with pytest.raises(CalibrationError, match=r"for fc2\.weight it was recorded on other weights"):
            run(call, x)
    with torch.no_grad():
        model.fc2.weight.div_(2)
    assert_close("int8/model", actual=run(call, x), expected=run(model, x))
