"""torch.compile(model, backend="w8a8"): right numbers for the weights as they are, or one clear error."""

import copy
import gc
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import by_hand, compiled, run_python
from graphs import Attention, GatedMLP, PostNorm, ReluMLP
from tolerances import assert_close, row_for
from torch import Tensor, nn

import qcompile
from qcompile import backend, weights
from qcompile.calibration import Calibration, Field
from qcompile.config import Config
from qcompile.errors import CalibrationError, ConfigError, GradientError, QCompileError, WeightError
from qcompile.weights import STORE, Binding

KINDS = [GatedMLP, Attention, PostNorm, ReluMLP]


def run(call: Callable[..., Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return call(x)


def check(call: Callable[..., Tensor], model: nn.Module, x: Tensor) -> None:
    """The compiled call computes what W8A8 arithmetic on the live weights does, and not the float function."""
    actual = run(call, x)
    assert_close(row_for("rewrite", x.dtype), actual=actual, expected=run(by_hand(model), x))
    assert not torch.equal(actual, run(model, x))


# Numbers


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_int8_arithmetic(kind: type[nn.Module]) -> None:
    model = kind()
    check(compiled(model), model, torch.randn(2, 5, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_half_and_double_precision_models(dtype: torch.dtype) -> None:
    model, x = ReluMLP().to(dtype), torch.randn(4, 16, dtype=dtype)
    y = run(compiled(model), x)
    assert_close("int8/model", actual=y, expected=run(model, x))
    assert_close(
        row_for("rewrite", dtype) if dtype != torch.float64 else "int8/model", actual=y, expected=run(by_hand(model), x)
    )


@pytest.mark.parametrize("options", [
    {"activations": "tensor"},
    {"activations": "static", "calibrate": 1},
    {"calibrate": 1, "alpha": 0.8},
    {"calibrate": 1, "alpha": None},
], ids=str)  # fmt: skip
def test_every_scheme_is_close_to_float(options: dict[str, Any]) -> None:
    model, x = GatedMLP(), torch.randn(4, 9, 16)
    call = compiled(model, **options)
    for _ in range(options.get("calibrate", 0)):
        run(call, x)
    assert_close("int8/model", actual=run(call, x), expected=run(model, x))
    assert not torch.equal(run(call, x), run(model, x))


@pytest.mark.parametrize(("dtype", "row"), [("fp8", "fp8/linear"), ("fp8_e5m2", "fp8_e5m2/linear")])
def test_fp8_runs_on_a_cpu_and_says_that_it_is_slow(dtype: str, row: str) -> None:
    model, x = ReluMLP(), torch.randn(8, 16)
    with pytest.warns(UserWarning, match="fp8 on CPU is computed by dequantizing"):
        y = run(compiled(model, dtype=dtype), x)
    assert_close(row, actual=y, expected=run(model, x))
    assert not torch.equal(y, run(model, x))


def test_ignored_linears_stay_in_float() -> None:
    model, x = ReluMLP(), torch.randn(4, 16)
    call = compiled(model, ignore=["fc2"])
    expected = by_hand(model)
    expected.fc2 = model.fc2
    assert_close("rewrite/float32", actual=run(call, x), expected=run(expected, x))


def test_a_function_of_a_model_can_be_compiled() -> None:
    model, x = ReluMLP().eval(), torch.randn(4, 16)

    @torch.compile(backend="w8a8", options={"inner": "eager"})
    def twice(x: Tensor) -> Tensor:
        return model(model(x)[..., :16])

    expected = by_hand(model)
    assert_close("rewrite/float32", actual=run(twice, x), expected=run(lambda x: expected(expected(x)), x))


def test_module_compile_in_place() -> None:
    model = ReluMLP().eval()
    reference = copy.deepcopy(model)
    model.compile(backend="w8a8", options={"inner": "eager"})
    x = torch.randn(4, 16)
    assert_close("rewrite/float32", actual=run(model, x), expected=run(by_hand(reference), x))


def test_an_empty_batch() -> None:
    model = ReluMLP()
    call = compiled(model)
    assert run(call, torch.randn(0, 16)).shape == (0, 16)
    check(call, model, torch.randn(3, 16))


@pytest.mark.parametrize("options", [{}, {"calibrate": 1}], ids=["plain", "calibrate"])
def test_autocast_applies_where_the_model_lets_it(options: dict[str, Any]) -> None:
    class Positions(nn.Module):
        """Computes angles in float32 whatever the caller says, as rotary embeddings do."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)
            self.register_buffer("frequencies", torch.rand(8, 1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", enabled=False):
                angles = self.frequencies @ (x[:1] * 1000)
            return self.fc(x), angles

    model, x = Positions(), torch.randn(4, 16)
    call = compiled(model, **options)
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            (actual, angles), (expected, exact) = call(x), model(x)
        assert_close("int8/model", actual=actual, expected=expected)
        assert torch.equal(angles, exact)


def test_merged_adapters_follow_their_parts() -> None:
    """The weight is an expression of several parameters; a write to any of them counts."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)
            self.down, self.up = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(16, 4))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.fc.weight + self.up @ self.down, self.fc.bias)

    model, x = Adapted(), torch.randn(4, 16)
    call = compiled(model)
    for name in ("down", "up", "fc.weight"):
        assert_close("int8/model", actual=run(call, x), expected=run(model, x))
        with torch.no_grad():
            model.get_parameter(name).mul_(-3)
    assert_close("int8/model", actual=run(call, x), expected=run(model, x))


# Sharing


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> list[Binding]:
    """Every binding made while a test runs."""
    made: list[Binding] = []

    class Noted(Binding):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(backend, "Binding", Noted)
    return made


@pytest.mark.parametrize("options", [{}, {"calibrate": 1}], ids=["plain", "smoothed"])
def test_further_shapes_prepare_nothing(options: dict[str, Any], bindings: list[Binding]) -> None:
    call = compiled(ReluMLP(), **options)
    for _ in range(2):
        run(call, torch.randn(3, 16))
    computed = STORE.computed
    for shape in ((5, 16), (2, 7, 16), (1, 16), (3, 16)):
        y = run(call, torch.randn(shape))
        assert y.shape == shape
    assert STORE.computed == computed
    assert len(bindings) >= 3
    pointers = [{value.data_ptr() for value in binding.values} for binding in bindings]
    assert all(found == pointers[0] for found in pointers)


def test_a_repeated_call_binds_nothing(bindings: list[Binding]) -> None:
    call = compiled(ReluMLP())
    for _ in range(4):
        run(call, torch.randn(3, 16))
    assert len(bindings) == 1


def test_a_calibration_file_is_shared_too(tmp_path: Path, bindings: list[Binding]) -> None:
    model = ReluMLP().eval()
    qcompile.calibrate(model, [torch.randn(6, 16)]).save(tmp_path / "file")
    call = compiled(model, calibration=str(tmp_path / "file"))
    run(call, torch.randn(3, 16))
    computed = STORE.computed
    run(call, torch.randn(2, 5, 16))
    assert STORE.computed == computed
    assert len(bindings) == 2


def test_weights_are_released_with_the_model() -> None:
    gc.collect()
    model = ReluMLP()
    before = len(STORE._kept)
    call = compiled(model)
    run(call, torch.randn(3, 16))
    assert len(STORE._kept) > before
    torch._dynamo.reset()
    del call, model
    gc.collect()
    assert len(STORE._kept) == before


# Calibration


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


# Live weights


def replace_data(model: ReluMLP) -> None:
    model.fc1.weight.data = torch.randn(24, 16)


def multiply_in_place(model: ReluMLP) -> None:
    with torch.no_grad():
        model.fc2.weight.mul_(-1.7)


def write_through_detach(model: ReluMLP) -> None:
    model.fc2.weight.detach().normal_()


def write_in_inference_mode(model: ReluMLP) -> None:
    with torch.inference_mode():
        model.fc1.weight.normal_()


def initialise(model: ReluMLP) -> None:
    nn.init.normal_(model.fc1.weight)
    nn.init.normal_(model.fc2.bias)


def load(model: ReluMLP) -> None:
    model.load_state_dict(ReluMLP().state_dict())


def load_assigning(model: ReluMLP) -> None:
    model.load_state_dict(ReluMLP().state_dict(), assign=True)


def swap_parameter(model: ReluMLP) -> None:
    model.fc1.weight = nn.Parameter(torch.randn(24, 16))


def swap_module(model: ReluMLP) -> None:
    model.fc1 = nn.Linear(16, 24)


def swap_modules_of_one_shape(model: nn.Module) -> None:
    model.fc1, model.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)


def change_bias_and_norm(model: ReluMLP) -> None:
    model.fc1.bias.data = torch.randn(24)
    with torch.no_grad():
        model.norm.weight.mul_(2)


def remove_bias(model: ReluMLP) -> None:
    model.fc1.bias = None


def step(model: ReluMLP) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(model.parameters(), 0.5).step()


CHANGES = [
    replace_data, multiply_in_place, write_through_detach, write_in_inference_mode, initialise, load, load_assigning,
    swap_parameter, swap_module, swap_modules_of_one_shape, change_bias_and_norm, remove_bias, step,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_numbers_follow_the_live_weights(change: Callable[[nn.Module], None]) -> None:
    model, x = ReluMLP(), torch.randn(4, 16)
    call = compiled(model)
    check(call, model, x)
    before = run(call, x)
    change(model)
    check(call, model, x)
    assert not torch.allclose(run(call, x), before)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_self_calibrated_model_follows_the_live_weights(change: Callable[[nn.Module], None]) -> None:
    model, x = ReluMLP(), torch.randn(4, 16)
    call = compiled(model, calibrate=1)
    for _ in range(2):
        run(call, x)
    change(model)
    for _ in range(2):
        assert_close("int8/model", actual=run(call, x), expected=run(model, x))
    settled = run(call, x)
    assert not torch.allclose(settled, run(model, x), rtol=1e-5)


def test_weights_at_a_recycled_address_are_not_mistaken() -> None:
    """A new parameter with the id, address and version of one that is gone."""
    model, x = ReluMLP(), torch.randn(4, 16)
    memory = torch.randn(24, 16).numpy()
    model.fc1.weight = nn.Parameter(torch.from_numpy(memory))
    call = compiled(model)
    recycled = 0
    for _ in range(30):  # whether the allocator hands an id out again is luck
        check(call, model, x)
        before = identity(model.fc1.weight)
        memory[:] = torch.randn(24, 16).numpy()
        model.fc1.weight = None
        gc.collect()
        tried = [nn.Parameter(torch.from_numpy(memory))]
        while identity(tried[-1]) != before and len(tried) < 1000:
            tried.append(nn.Parameter(torch.from_numpy(memory)))
        model.fc1.weight = tried[-1]
        recycled += identity(tried[-1]) == before
        if recycled == 3:
            break
    assert recycled, "no id was recycled; the test shows nothing"
    check(call, model, x)


def identity(tensor: Tensor) -> tuple[int, int, int]:
    return id(tensor), tensor.data_ptr(), tensor._version


def test_models_at_recycled_addresses_are_not_mistaken() -> None:
    x = torch.randn(4, 16)
    for _ in range(6):
        model = ReluMLP()
        check(compiled(model), model, x)
        del model
        gc.collect()


def test_a_write_through_data_needs_a_refresh() -> None:
    model, x = ReluMLP(), torch.randn(4, 16)
    call = compiled(model)
    before = run(call, x)
    model.fc1.weight.data.mul_(-2)
    assert torch.equal(run(call, x), before), "if this fails, writes through .data are seen: drop refresh()"
    qcompile.refresh()
    check(call, model, x)


def test_refresh_reaches_every_model_and_shape() -> None:
    models = ReluMLP(), PostNorm()
    calls = [compiled(model) for model in models]
    shapes = (1, 16), (4, 16)
    for call in calls:
        for shape in shapes:
            run(call, torch.randn(shape))
    for model in models:
        for parameter in model.parameters():
            parameter.data.add_(0.1)
    weights.refresh()
    for call, model in zip(calls, models, strict=True):
        for shape in shapes:
            check(call, model, torch.randn(shape))


def test_two_models_of_one_shape_do_not_mix() -> None:
    models = [ReluMLP() for _ in range(3)]
    calls = [compiled(model) for model in models]
    for _ in range(2):
        x = torch.randn(4, 16)
        for call, model in zip(calls, models, strict=True):
            check(call, model, x)
    multiply_in_place(models[1])
    for call, model in zip(calls, models, strict=True):
        check(call, model, x)


def test_two_calibrations_of_one_model_do_not_mix() -> None:
    model, x = ReluMLP().eval(), torch.randn(4, 16)
    spread = torch.ones(16)
    spread[::4] = 100
    found = [qcompile.calibrate(model, [x]), qcompile.calibrate(model, [x * spread])]
    alone = []
    for calibration in found:
        torch._dynamo.reset()
        qcompile.refresh()
        alone.append(run(compiled(model, calibration=calibration), x))
    assert not torch.equal(alone[0], alone[1])
    torch._dynamo.reset()
    calls = [compiled(model, calibration=calibration) for calibration in found]
    for _ in range(2):
        for call, expected in zip(calls, alone, strict=True):
            assert torch.equal(run(call, x), expected)


# Several graphs


class Broken(nn.Module):
    """Layers with a graph break after each."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ReluMLP() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
            torch._dynamo.graph_break()
        return x


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
    multiply_in_place(model.layers[2])
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


# Gradients


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


# Mistakes


@pytest.mark.parametrize("name", ["fc1.weight", "fc2.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(name: str, value: float) -> None:
    model, x = ReluMLP(), torch.randn(2, 16)
    with torch.no_grad():
        model.get_parameter(name)[1, 2] = value
    call = compiled(model)
    for _ in range(2):
        with pytest.raises(WeightError, match=rf"weights must be finite; {name} has NaN or Inf; check"):
            run(call, x)
    with torch.no_grad():
        model.get_parameter(name)[1, 2] = 0.5
    check(call, model, x)


def test_a_weight_that_becomes_nan_is_named() -> None:
    model, x = ReluMLP(), torch.randn(2, 16)
    call = compiled(model)
    check(call, model, x)
    with torch.no_grad():
        model.fc2.weight[0, 0] = torch.nan
    with pytest.raises(WeightError, match=r"fc2\.weight has NaN or Inf"):
        run(call, x)


class NoLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (NoLinear, {}, "the model has no linear layers; w8a8 has nothing to quantize"),
        (ReluMLP, {"ignore": ("*",)}, "no linear is left to quantize: 2 stay in float, fc1 because its name matches"),
        (ReluMLP, {"alfa": 0.5}, "unknown option 'alfa' for backend w8a8; did you mean 'alpha'"),
        (ReluMLP, {"alpha": 0.5}, r"alpha=0\.5 needs activation statistics"),
        (ReluMLP, {"calibration": 3}, "calibration must be a qcompile.Calibration or a path; got int"),
        (ReluMLP, {"dump": 3}, "dump must be the path of a folder; got 3"),
    ],
)
def test_a_mistake_is_one_line_at_every_call(model: type[nn.Module], options: dict[str, Any], message: str) -> None:
    call = compiled(model(), **options)
    for _ in range(3):
        with pytest.raises(ConfigError, match=message) as caught:
            run(call, torch.randn(2, 16))
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is None


def test_a_missing_calibration_file_is_one_line_at_every_call(tmp_path: Path) -> None:
    call = compiled(ReluMLP(), calibration=tmp_path / "file")
    for _ in range(2):
        with pytest.raises(CalibrationError, match="no calibration file at"):
            run(call, torch.randn(2, 16))


def test_errors_do_not_grow_from_call_to_call() -> None:
    call = compiled(NoLinear())
    lengths = []
    for _ in range(3):
        with pytest.raises(QCompileError) as caught:
            run(call, torch.randn(2, 16))
        lengths.append(len(traceback.format_exception(caught.value)))
    assert lengths[0] == lengths[-1]


def test_equal_options_share_a_session() -> None:
    assert backend.session_for(Config(calibrate=2)) is backend.session_for(Config(calibrate=2))
    assert backend.session_for(Config(calibrate=2)) is not backend.session_for(Config(calibrate=3))


# Inductor


@pytest.mark.inductor
def test_inductor_gives_the_same_numbers() -> None:
    model = Attention()
    call = compiled(model, inner="inductor")
    for shape in ((2, 5, 16), (3, 7, 16)):
        x = torch.randn(shape)
        assert_close("inductor/float32", actual=run(call, x), expected=run(by_hand(model), x))


@pytest.mark.inductor
def test_inductor_calibrates_itself_and_follows_the_weights() -> None:
    model, x = ReluMLP().bfloat16(), torch.randn(4, 16).bfloat16()
    call = compiled(model, inner="inductor", calibrate=1)
    assert_close("rewrite/bfloat16", actual=run(call, x), expected=run(model, x))
    assert_close("int8/model", actual=run(call, x), expected=run(model, x))
    model.load_state_dict(ReluMLP().bfloat16().state_dict(), assign=True)
    assert_close("rewrite/bfloat16", actual=run(call, x), expected=run(model, x))
    assert_close("int8/model", actual=run(call, x), expected=run(model, x))


FRESH = """
import sys, torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
x = torch.randn(4, 16)
assert not any(name.startswith("qcompile") for name in sys.modules)
call = torch.compile(model, backend="w8a8", options={"inner": "eager"})
with torch.no_grad():
    y, expected = call(x), model(x)
print("error", float((y - expected).norm() / expected.norm()))
"""


def test_a_process_that_never_imports_qcompile(tmp_path: Path) -> None:
    printed = run_python(FRESH, cwd=tmp_path)
    error = float(printed.split("error ")[1].split()[0])
    assert 1e-4 < error < 2e-2
    assert "Warning" not in printed


CACHED = """
import sys, torch
from torch import nn
from torch._dynamo.utils import counters
from compiling import by_hand
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
x = torch.randn(4, 16)
with torch.no_grad():
    for backend in sys.argv[1:]:
        torch._dynamo.reset()
        counters.clear()
        y = torch.compile(model, backend=backend)(x)
        expected = (by_hand(model) if backend == "w8a8" else model)(x)
        right = float((y - expected).norm() / expected.norm()) < 1e-5
        print("ran", backend, right, counters["inductor"]["fxgraph_cache_hit"])
    print("differ by", float((by_hand(model)(x) - model(x)).norm()))
"""


@pytest.mark.inductor
@pytest.mark.parametrize("order", [("inductor", "w8a8"), ("w8a8", "inductor")], ids="-then-".join)
def test_caches_are_used_and_not_mixed_up_with_inductors(order: tuple[str, str], tmp_path: Path) -> None:
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
    }
    for arguments, hits in ((order, 0), (order[::-1], 1)):
        printed = run_python(CACHED, *arguments, **caches).splitlines()
        assert [line for line in printed if line.startswith("ran")] == [f"ran {name} True {hits}" for name in arguments]
        assert float(printed[-1].removeprefix("differ by")) > 1e-3
