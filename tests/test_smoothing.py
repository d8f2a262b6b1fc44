"""smooth: parameters change, the function does not."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import Attention, GatedMLP, PostNorm, ReluMLP
from in_place import changed, kind_with, run, state, with_outliers
from probe import Body
from subjects import DropBias
from tolerances import assert_close, row_for
from torch import Tensor, nn
from torch.nn import functional as F

import qcompile
from qcompile import debug, passes
from qcompile.calibration import Calibration
from qcompile.errors import CalibrationError, CaptureError, ConfigError, QCompileError, VerifyError, WeightError
from qcompile.pass_pipeline import Pipeline

FOLDING = {
    GatedMLP: {"norm.weight", "gate_proj.weight", "up_proj.weight", "down_proj.weight"},
    Attention: {"norm.weight", "norm.bias", "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"},
    ReluMLP: {"norm.weight", "norm.bias", "fc1.weight", "fc1.bias", "fc2.weight"},
    PostNorm: set(),
}


@pytest.mark.parametrize("kind", FOLDING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_smoothing_alone_changes_nothing(kind: type[nn.Module], dtype: torch.dtype) -> None:
    model, x = with_outliers(kind, dtype), torch.randn(2, 5, 16).to(dtype)
    before, y = state(model), run(model, x)
    assert qcompile.smooth(model, qcompile.calibrate(model, [x]), 0.5) is model
    assert changed(model, before) == FOLDING[kind]
    assert_close(row_for("smooth", dtype), actual=run(model, x), expected=y)
    other = torch.randn(1, 9, 16).to(dtype)
    assert_close(row_for("smooth", dtype), actual=run(model, other), expected=run(kind_with(kind, before), other))


class Sorted(nn.Module):
    """Tokens of two sorts, which data tells apart: indexed by masks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.fc1, self.fc2, self.down = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def parts(self, h: Tensor, sort: Tensor) -> tuple[Tensor, ...]:
        return h[sort > 0], h[sort <= 0]

    def forward(self, x: Tensor, sort: Tensor) -> Tensor:
        first, second = self.parts(self.down(torch.relu(self.fc2(self.norm(x)))), sort)
        return torch.cat([torch.relu(self.fc1(first)), self.fc1(second)])


class Split(Sorted):
    """The same by counts, as JetMoE's experts."""

    def parts(self, h: Tensor, sort: Tensor) -> tuple[Tensor, ...]:
        first, second = h[sort.argsort()].split([(sort <= 0).sum().item(), (sort > 0).sum().item()])
        return first, second


class Merged(Sorted):
    """Features take the place of some tokens, as images do in vision-language models, which count them first."""

    def forward(self, x: Tensor, sort: Tensor) -> Tensor:
        features = torch.relu(self.fc1(self.norm(x)))
        place = (sort > 0)[:, None].expand_as(x)
        torch._check(place.sum().item() <= features.numel())
        return self.down(torch.relu(self.fc2(self.norm(x.masked_scatter(place, features)))))


@pytest.mark.parametrize("kind", [Sorted, Split, Merged])
def test_sizes_that_data_decides_change_nothing_either(kind: type[Sorted]) -> None:
    model = with_outliers(kind, torch.float64)
    calls = [{"x": torch.randn(9, 16, dtype=torch.float64), "sort": torch.randn(9)} for _ in range(3)]
    with torch.no_grad():
        expected = [model(**call) for call in calls]
    before = state(model)
    qcompile.smooth(model, qcompile.calibrate(model, calls[:1]))
    norm = set() if kind is Merged else {"norm.weight", "norm.bias"}
    assert changed(model, before) == {"fc2.weight", "fc2.bias", "down.weight"} | norm
    for call, y in zip(calls, expected, strict=True):
        with torch.no_grad():
            assert_close("smooth/float64", actual=model(**call), expected=y)


def test_the_scales_are_equation_4() -> None:
    model, x = with_outliers(ReluMLP, torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    before, found = state(model), qcompile.calibrate(model, [x])
    qcompile.smooth(model, found, 0.7)
    absmax = found.statistics["fc1.weight"].absmax.double()
    expected = absmax**0.7 / before["fc1.weight"].abs().amax(0) ** 0.3
    torch.testing.assert_close(before["norm.weight"] / model.get_parameter("norm.weight"), expected)
    torch.testing.assert_close(before["norm.bias"] / model.get_parameter("norm.bias"), expected)


def test_alpha_one_moves_the_whole_range_into_the_weights() -> None:
    model, x = with_outliers(ReluMLP), torch.randn(4, 9, 16)
    qcompile.smooth(model, qcompile.calibrate(model, [x]), 1.0)
    again = qcompile.calibrate(model, [x])
    for statistic in again.statistics.values():
        seen = statistic.absmax[statistic.absmax > 0]
        torch.testing.assert_close(seen, torch.ones_like(seen), rtol=1e-4, atol=0)


def test_outliers_get_smaller() -> None:
    model, x = with_outliers(ReluMLP), torch.randn(4, 9, 16)
    found = qcompile.calibrate(model, [x])
    qcompile.smooth(model, found, 0.5)
    before, after = (c.statistics["fc1.weight"].absmax for c in (found, qcompile.calibrate(model, [x])))
    assert after.max() / after.median() < before.max() / before.median() / 3


def test_ignored_linears_are_compensated_but_not_smoothed() -> None:
    model, x = with_outliers(GatedMLP, torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    before, y = state(model), run(model, x)
    found = qcompile.calibrate(model, [x])
    qcompile.smooth(model, found, 0.5, ignore=("gate_proj",))
    assert_close("smooth/float64", actual=run(model, x), expected=y)
    assert "gate_proj.weight" in changed(model, before)
    scale = model.get_parameter("up_proj.weight") / before["up_proj.weight"]
    assert scale.shape == (24, 16)
    everything = kind_with(GatedMLP, before)
    qcompile.smooth(everything, qcompile.calibrate(everything, [x]), 0.5)
    assert not torch.equal(everything.get_parameter("norm.weight"), model.get_parameter("norm.weight"))


def test_a_parameter_read_twice_is_not_edited() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc, self.other = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(x)) + self.other(self.norm(x + 1)) * 2

    model, x = with_outliers(Twice), torch.randn(3, 16)
    before, y = state(model), run(model, x)
    qcompile.smooth(model, qcompile.calibrate(model, [x]), 0.5)
    assert "norm.weight" not in changed(model, before)
    assert_close("smooth/float32", actual=run(model, x), expected=y)


def test_smoothing_twice_is_refused() -> None:
    model, x = with_outliers(ReluMLP), torch.randn(2, 5, 16)
    found = qcompile.calibrate(model, [x])
    qcompile.smooth(model, found, 0.5)
    before = state(model)
    with pytest.raises(CalibrationError, match="the calibration does not belong to this model"):
        qcompile.smooth(model, found, 0.5)
    assert not changed(model, before)


def test_another_models_calibration_is_refused_before_anything_is_written() -> None:
    model, x = with_outliers(ReluMLP), torch.randn(2, 5, 16)
    found = qcompile.calibrate(model, [x])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("fc2.weight").add_(1)
    before = state(other)
    with pytest.raises(CalibrationError, match=r"for fc2\.weight it was recorded on other weights"):
        qcompile.smooth(other, found, 0.5)
    assert not changed(other, before)


@pytest.mark.parametrize("alpha", [None, "best", 2.0])
def test_alpha_must_be_a_number(alpha: float) -> None:
    model = ReluMLP()
    found = qcompile.calibrate(model, [torch.randn(2, 16)])
    with pytest.raises(ConfigError, match="alpha"):
        qcompile.smooth(model, found, alpha)


def test_a_calibration_without_an_example_is_refused() -> None:
    model = ReluMLP()
    found = dataclasses.replace(qcompile.calibrate(model, [torch.randn(2, 16)]), example={})
    with pytest.raises(CalibrationError, match="needs a call to capture it with"):
        qcompile.smooth(model, found)


def test_another_call_may_be_the_example() -> None:
    """Statistics of calls that break the graph, with another one to prove: such as tokens without images."""

    class Breaks(GatedMLP):
        def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
            if extra is not None:
                x = x + extra
                torch._dynamo.graph_break()
            return super().forward(x)

    model, x = with_outliers(Breaks), torch.randn(3, 16)
    calls = [{"x": x, "extra": torch.randn(16)}, {"x": 2 * x}]
    found = qcompile.calibrate(model, calls)
    with pytest.raises(CaptureError, match=r"proves one kind of call; the calibration saw 2.*say which by example="):
        qcompile.smooth(model, found)
    with torch.no_grad():
        expected = [model(**call) for call in calls]
    before = state(model)
    qcompile.smooth(model, found, example=x)  # a tensor: the model's first input
    assert changed(model, before) == FOLDING[GatedMLP]
    for call, y in zip(calls, expected, strict=True):
        with torch.no_grad():
            assert_close("smooth/float32", actual=model(**call), expected=y)


def test_an_overflow_is_refused_before_anything_is_written() -> None:
    class Cancels(nn.Module):
        """Two equal channels with opposite weights: products overflow fp16, sums do not."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(x))

    model = Cancels().half()
    with torch.no_grad():
        model.norm.weight.fill_(600)
        model.fc.weight.fill_(0)
        model.fc.weight[:, 0], model.fc.weight[:, 1] = 300, -300
    x = torch.randn(4, 16).half()
    x[:, 0] = x[:, 1] = 3
    found: Calibration = qcompile.calibrate(model, [x])
    before = state(model)
    with pytest.raises(WeightError, match=r"must stay finite; fc\.weight does not fit its dtype; nothing was changed"):
        qcompile.smooth(model, found, 1.0)
    assert not changed(model, before)
    qcompile.smooth(model, found, 0.5)
    assert changed(model, before)


# What cannot be proved, or cannot be written back, leaves the model as it was.


def unchanged(model: nn.Module, inputs: dict[str, Any], match: str) -> None:
    """smooth refuses in one line, and no parameter has changed."""
    before = [parameter.clone() for parameter in model.parameters()]
    calibration = qcompile.calibrate(model, [inputs])
    with pytest.raises(QCompileError, match=match):
        qcompile.smooth(model, calibration, ignore=())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_expanded_parameter_is_refused_before_anything_is_written() -> None:
    model = Body(lambda m, x: m.b(torch.relu(m.a(F.layer_norm(x, (16,)) * m.gain))), a=nn.Linear(16, 16),
                 b=nn.Linear(16, 4), gain=nn.Parameter(torch.ones(1).expand(16)))  # fmt: skip
    unchanged(model.requires_grad_(False), {"x": torch.randn(8, 16)}, "memory for every element; gain is expanded")


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)) if relu else torch.tanh(self.fc1(x)))


def test_two_kinds_of_calls_are_refused() -> None:
    model, x = Modes().requires_grad_(False), torch.randn(8, 16)
    calibration = qcompile.calibrate(model, [{"x": x, "relu": True}, {"x": x, "relu": False}])
    with pytest.raises(QCompileError, match="proves one kind of call; the calibration saw 2"):
        qcompile.smooth(model, calibration)


@pytest.mark.parametrize("relu", [True, False])
def test_flags_of_the_calls_are_those_of_the_proof(relu: bool) -> None:
    """tanh lets no scale pass, so a graph of the other path would be the wrong one to prove."""
    model, x = Modes().requires_grad_(False), torch.randn(8, 16)
    before, weight = model(x, relu=relu), model.fc1.weight.clone()
    qcompile.smooth(model, qcompile.calibrate(model, [{"x": x, "relu": relu}]))
    assert torch.equal(model.fc1.weight, weight) != relu
    assert_close("smooth/float32", actual=model(x, relu=relu), expected=before)


@pytest.mark.parametrize("kind", ["buffer", "integer"])
def test_what_is_no_float_parameter_absorbs_nothing(kind: str) -> None:
    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)
            gain = torch.arange(1, 17) if kind == "integer" else torch.rand(16) + 0.5
            self.register_buffer("gain", gain, persistent=kind != "buffer")

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.layer_norm(x, (16,)) * self.gain.float())

    model, x = Gained().requires_grad_(False), torch.randn(8, 16)
    before, gain = model(x), model.gain.clone()
    qcompile.smooth(model, qcompile.calibrate(model, [{"x": x}]))
    assert torch.equal(model.gain, gain)
    assert_close("smooth/float32", actual=model(x), expected=before)


@pytest.mark.parametrize(("calibration", "message"), [(None, "got None; record one"), ("/no", "no calibration file")])
def test_a_calibration_that_is_none_is_one_line(calibration: Any, message: str) -> None:
    with pytest.raises(QCompileError, match=message):
        qcompile.smooth(ReluMLP(), calibration)


def test_it_is_watched_as_qcompile_debug_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A pass that is wrong is found out by its numbers, before anything is written."""
    monkeypatch.chdir(tmp_path)
    model = with_outliers(ReluMLP)
    calibration = qcompile.calibrate(model, [torch.randn(2, 16)])
    smoothing = passes.smoothing
    monkeypatch.setattr(passes, "smoothing", lambda config: Pipeline((*smoothing(config).passes, DropBias())))
    before = state(model)
    monkeypatch.setenv(debug.VARIABLE, "dump,verify")
    with pytest.raises(VerifyError, match="pass drop_bias must be exact"):
        qcompile.smooth(model, calibration)
    assert not changed(model, before)
    assert (tmp_path / debug.DEFAULT_FOLDER / "graph-000" / "02.smooth.diff").is_file()


@pytest.mark.parametrize("kind", FOLDING)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_it_stands_verification(kind: type[nn.Module], power_of_two: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(debug.VARIABLE, "verify")
    model, x = with_outliers(kind), torch.randn(2, 5, 16)
    qcompile.smooth(model, qcompile.calibrate(model, [x]), power_of_two=power_of_two)
