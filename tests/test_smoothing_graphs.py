"""smooth, of models in several graphs: what one graph alone reads is scaled, and the function does not change."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from graphs import Broken, BrokenUp, ReluMLP
from in_place import changed, kind_with, run, state, with_outliers
from tolerances import assert_close
from torch import Tensor, nn

import qcompile
from qcompile.errors import CaptureError

PARTS = ("first", "second")
NORM, LINEARS = {"norm.weight", "norm.bias"}, {"fc1.weight", "fc1.bias", "fc2.weight"}
EVERYTHING = NORM | LINEARS
SEVERAL: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "nothing else": ({}, EVERYTHING, EVERYTHING),
    "a norm in two graphs": ({"after": lambda model, h: model.first.norm(h)}, LINEARS, EVERYTHING),
    "a bias in two graphs": (
        {"after": lambda model, h: h + model.first.fc1.bias[:16]}, NORM | {"fc1.weight"}, EVERYTHING
    ),
    "all in two graphs": ({"after": lambda model, h: model.first(h)}, set(), EVERYTHING),
    "a gain between": ({"between": lambda model: 2 * model.second.norm.weight}, EVERYTHING, LINEARS),
    "a weight between": ({"between": lambda model: model.second.fc2.weight.sum(1)}, EVERYTHING, NORM | {"fc1.weight"}),
}  # fmt: skip


@pytest.mark.parametrize("case", SEVERAL)
def test_several_graphs_are_scaled_where_one_alone_reads(case: str) -> None:
    options, *expected = SEVERAL[case]
    model, x = with_outliers(functools.partial(BrokenUp, **options), torch.float64), torch.randn(3, 16).double()
    before, y = state(model), run(model, x)
    qcompile.smooth(model, qcompile.calibrate(model, [x]))
    found = [{name.partition(".")[2] for name in changed(model, before) if name.startswith(part)} for part in PARTS]
    assert found == expected
    assert_close("smooth/float64", actual=run(model, x), expected=y)


class Unbroken(Broken):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_layers_that_share_a_graph_are_each_scaled() -> None:
    model, x = with_outliers(Broken, torch.float64), torch.randn(3, 16).double()
    before, y = state(model), run(model, x)
    found = qcompile.calibrate(model, [x])
    qcompile.smooth(model, found)
    assert changed(model, before) == {f"layers.{i}.{name}" for i in range(3) for name in EVERYTHING}
    assert_close("smooth/float64", actual=run(model, x), expected=y)
    whole = kind_with(Unbroken, before)
    qcompile.smooth(whole, found)
    assert all(torch.equal(value, state(whole)[name]) for name, value in state(model).items())


def test_a_fold_across_a_break_is_left_out() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            torch._dynamo.graph_break()
            return self.fc(h)

    model = with_outliers(Apart)
    before = state(model)
    qcompile.smooth(model, qcompile.calibrate(model, [torch.randn(2, 16)]))
    assert not changed(model, before)


def test_memory_that_parameters_of_two_graphs_share() -> None:
    model, x = with_outliers(BrokenUp), torch.randn(2, 16)
    model.get_submodule("second.norm").weight.data = model.get_parameter("first.norm.weight").data
    before, y = state(model), run(model, x)
    qcompile.smooth(model, qcompile.calibrate(model, [x]))
    assert not changed(model, before) & {f"{part}.norm.weight" for part in PARTS}
    assert_close("smooth/float32", actual=run(model, x), expected=y)

    shared = np.ones(16, dtype=np.float32)
    for part in PARTS:
        model.get_submodule(f"{part}.norm").weight.data = torch.from_numpy(shared)
    before, y = state(model), run(model, x)
    qcompile.smooth(model, qcompile.calibrate(model, [x]))
    assert not changed(model, before) & {f"{part}.norm.weight" for part in PARTS}
    assert_close("smooth/float32", actual=run(model, x), expected=y)


@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_parts_that_the_user_compiled_are_looked_at_too(backend: str) -> None:
    """Code that Inductor made reads memory without an operator that could be seen."""

    class Shares(BrokenUp):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(1):
                torch._dynamo.graph_break()
                x = self.second(self.first(x))
            return x

    model, x = with_outliers(Shares, torch.float64), torch.randn(3, 16).double()
    model.second.norm = model.first.norm
    model.second.compile(backend=backend)
    before, y = state(model), run(model, x)
    qcompile.smooth(model, qcompile.calibrate(model, [x]))
    assert changed(model, before) == {f"{part}.{name}" for part in PARTS for name in LINEARS}
    assert_close("smooth/float64", actual=run(model, x), expected=y)


def test_a_compiled_model_is_smoothed_as_the_model_behind() -> None:
    model, x = with_outliers(BrokenUp, torch.float64), torch.randn(3, 16).double()
    before, y = state(model), run(model, x)
    compiled: Any = torch.compile(model, backend="eager")
    assert qcompile.smooth(compiled, qcompile.calibrate(compiled, [x])) is model
    assert len(changed(model, before)) == 2 * len(EVERYTHING)
    assert_close("smooth/float64", actual=run(model, x), expected=y)


def test_a_model_that_is_not_compiled_is_refused() -> None:
    model, x = with_outliers(ReluMLP), torch.randn(3, 16)
    found = qcompile.calibrate(model, [x])
    model.forward = torch.compiler.disable(model.forward)
    with pytest.raises(CaptureError, match="needs a call that torch.compile follows; nothing of ReluMLP's is compiled"):
        qcompile.smooth(model, found)
