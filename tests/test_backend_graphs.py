"""Models of several graphs: after a graph break, or one graph for many layers."""

from typing import Any

import pytest
import torch
from compiling import by_hand, compiled, run
from graphs import Broken, ReluMLP
from tolerances import assert_close
from torch import Tensor, nn

import qcompile
from qcompile.calibration import Calibration, Field


class Regional(nn.Module):
    """One function, compiled once, called for every layer."""

    def __init__(self, layers: int = 3, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ReluMLP() for _ in range(layers))
        self.block = torch.compile(lambda layer, x: x + layer(x), backend="w8a8", options={"inner": "eager", **options})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.block(layer, x)
        return x


class Sequence(nn.Module):
    """The same computation in one graph."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names under which statistics were asked for."""
    found: list[str] = []
    original = Calibration.statistic

    def statistic(self: Calibration, weight: Tensor, name: str, field: Field) -> Tensor:
        found.append(name)
        return original(self, weight, name, field)

    monkeypatch.setattr(Calibration, "statistic", statistic)
    return found


def test_graph_breaks_give_the_same_numbers() -> None:
    model, x = Broken(), torch.randn(4, 16)
    call = compiled(model)
    for rows in (4, 3, 4):
        x = torch.randn(rows, 16)
        assert_close("rewrite/float32", actual=run(call, x), expected=run(by_hand(Sequence(model.layers)), x))


def test_a_layer_compiled_once_serves_every_layer() -> None:
    model = Regional()
    for rows in (4, 3, 4):
        x = torch.randn(rows, 16)
        assert_close("rewrite/float32", actual=run(model, x), expected=run(by_hand(Sequence(model.layers)), x))
    model.layers[1] = ReluMLP()
    with torch.no_grad():
        model.layers[2].fc2.weight.mul_(-1.7)
    assert_close("rewrite/float32", actual=run(model, x), expected=run(by_hand(Sequence(model.layers)), x))


@pytest.mark.parametrize("broken", [True, False], ids=["graph breaks", "one function"])
def test_statistics_come_by_full_name(broken: bool, asked: list[str]) -> None:
    """The layers have equal weights, so that the name alone tells their statistics apart."""
    plain = Broken()
    for layer in plain.layers[1:]:
        layer.load_state_dict(plain.layers[0].state_dict())
    x = torch.randn(4, 16)
    found = qcompile.calibrate(plain.eval(), [x])
    asked.clear()
    model: Any = plain
    if not broken:
        model = Regional(calibration=found)
        model.layers = plain.layers
    call = compiled(plain, calibration=found) if broken else model
    y = run(call, x)
    assert set(asked) == {f"layers.{i}.fc{k}.weight" for i in range(3) for k in (1, 2)}
    torch._dynamo.reset()
    whole = Sequence(plain.layers)
    assert_close("rewrite/float32", actual=y, expected=run(compiled(whole, calibration=found), x))


@pytest.mark.parametrize("broken", [True, False], ids=["graph breaks", "one function"])
def test_several_graphs_calibrate_themselves(broken: bool) -> None:
    model: Any = Broken() if broken else Regional(calibrate=2)
    call = compiled(model, calibrate=2) if broken else model
    whole = Sequence(model.layers)
    x = torch.randn(4, 16)
    for _ in range(2):
        assert_close("rewrite/float32", actual=run(call, x), expected=run(whole, x))
    y = run(call, x)
    assert not torch.allclose(y, run(whole, x), rtol=1e-5)
    assert_close("int8/model", actual=y, expected=run(whole, x))


def ignoring(whole: nn.Module, layer: int) -> nn.Module:
    """The expected model when one layer of several stays in float."""
    expected = by_hand(whole)
    expected.layers[layer] = whole.layers[layer]
    return expected


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("options", [{}, {"calibrate": 1, "alpha": None}], ids=["plain", "calibrate"])
@pytest.mark.parametrize("broken", [True, False], ids=["graph breaks", "one function"])
def test_ignore_patterns_tell_layers_apart(broken: bool, options: dict[str, Any], layer: int) -> None:
    """Dynamo compiles the first layer and reuses its code for the others."""
    options = {"ignore": (f"layers.{layer}.*",), **options}
    model: Any = Broken() if broken else Regional(**options)
    call = compiled(model, **options) if broken else model
    for rows in (4, 4, 3):
        x = torch.randn(rows, 16)
        y = run(call, x)
    assert_close("rewrite/float32", actual=y, expected=run(ignoring(Sequence(model.layers), layer), x))


def test_a_second_models_layers_have_their_own_names() -> None:
    first, second = Broken(), Broken()
    x = torch.randn(4, 16)
    for model in (first, second):
        y = run(compiled(model, ignore=("layers.1.*",)), x)
        assert_close("rewrite/float32", actual=y, expected=run(ignoring(Sequence(model.layers), 1), x))


def test_calibration_leaves_out_ignored_layers_only() -> None:
    found = qcompile.calibrate(Broken().eval(), [torch.randn(4, 16)], ignore=("layers.0.*", "layers.2.fc1"))
    assert sorted(found.statistics) == ["layers.1.fc1.weight", "layers.1.fc2.weight", "layers.2.fc2.weight"]
