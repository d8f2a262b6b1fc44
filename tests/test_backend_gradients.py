"""Inference only: what requires gradients is refused in one line, every way without them works."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import by_hand, check, compiled, run
from graphs import Broken, ReluMLP
from tolerances import assert_close
from torch import Tensor, nn

from qcompile.errors import GradientError


def refuses_gradients(call: Callable[[], Any]) -> None:
    for _ in range(2):
        with pytest.raises(GradientError, match=r"runs inference only; .* wrap it in torch\.no_grad\(\)") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_parameters_that_require_gradients_are_refused_at_the_call() -> None:
    model, x = ReluMLP(), torch.randn(2, 16)
    call = compiled(model)
    refuses_gradients(lambda: call(x))
    check(call, model, x)
    refuses_gradients(lambda: call(x))


def test_an_input_that_requires_gradients_is_refused() -> None:
    model = ReluMLP().requires_grad_(False)
    call = compiled(model)
    refuses_gradients(lambda: call(torch.randn(2, 16, requires_grad=True)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_nested_call_that_requires_gradients_is_refused() -> None:
    outer = nn.Sequential(nn.Linear(16, 16), compiled(ReluMLP()))  # type: ignore[arg-type]
    refuses_gradients(lambda: outer(torch.randn(2, 16)))


def test_a_call_inside_a_training_step_is_refused() -> None:
    model, x = Broken(2), torch.randn(2, 16)
    call = compiled(model)

    def train() -> None:
        call(x).sum().backward()

    refuses_gradients(train)
    assert all(parameter.grad is None for parameter in model.parameters())


def without_gradients(model: nn.Module, call: Callable[..., Tensor], x: Tensor, how: str) -> Tensor:
    if how == "no_grad":
        with torch.no_grad():
            return call(x)
    if how == "inference_mode":
        with torch.inference_mode():
            return call(x)
    model.requires_grad_(False)
    return call(x)


HOWS = ["no_grad", "inference_mode", "requires_grad_"]


@pytest.mark.parametrize("first", HOWS)
@pytest.mark.parametrize("then", HOWS)
def test_every_way_without_gradients_works_after_every_other(first: str, then: str) -> None:
    model, x = ReluMLP(), torch.randn(2, 16)
    call, expected = compiled(model), run(by_hand(model), x)
    for how in (first, then, first):
        assert_close("rewrite/float32", actual=without_gradients(model, call, x, how).clone(), expected=expected)


@pytest.mark.parametrize("options", [{"calibrate": 2}, {"calibrate": 2, "activations": "static"}], ids=str)
def test_inference_mode_calibrates_itself(options: dict[str, Any]) -> None:
    model, x = ReluMLP(), torch.randn(2, 16)
    call = compiled(model, **options)
    for how in ("inference_mode", "no_grad", "inference_mode", "no_grad"):
        y = without_gradients(model, call, x, how).clone()
    assert_close("int8/model", actual=y, expected=run(model, x))
    assert not torch.allclose(y, run(model, x), rtol=1e-5)


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = ReluMLP()
        x = torch.randn(2, 16)
        call = compiled(model)
        y, again = call(x).clone(), call(x).clone()
        model.fc1.weight = nn.Parameter(torch.randn(24, 16))
        changed, expected = call(x).clone(), by_hand_inference(model)(x)
    assert torch.equal(y, again)
    assert not torch.allclose(y, changed)
    assert_close("rewrite/float32", actual=changed, expected=expected)


def by_hand_inference(model: nn.Module) -> nn.Module:
    return by_hand(model)
