"""smooth: parameters change, the function does not."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import Attention, Broken, BrokenUp, GatedMLP, PostNorm, ReluMLP
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


def with_outliers(kind: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in which smoothing has something to do: some channels of its norms are 30 times the others."""
    model = kind().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter[::5] *= 30
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    return model.to(dtype)  # after all that is random, which other dtypes and versions draw in other ways


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x)
    return y


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


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


def kind_with(kind: type[nn.Module], parameters: dict[str, Tensor]) -> nn.Module:
    model = kind().eval().to(next(iter(parameters.values())).dtype)
    model.load_state_dict(parameters)
    return model


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
