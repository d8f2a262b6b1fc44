"""torch.compile(model, backend="w8a8"): right numbers, in every process and through Inductor, or one clear error."""

import copy
import gc
import traceback
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import by_hand, check, compiled, run, run_python
from graphs import Attention, GatedMLP, PostNorm, ReluMLP
from tolerances import assert_close, row_for
from torch import Tensor, nn

import qcompile
from qcompile import backend
from qcompile.config import Config
from qcompile.errors import CalibrationError, ConfigError, QCompileError, WeightError

KINDS = [GatedMLP, Attention, PostNorm, ReluMLP]


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
    session = backend.session_for(Config(calibrate=2))
    assert backend.session_for(Config(calibrate=2)) is session
    assert backend.session_for(Config(calibrate=3)) is not session


def test_a_session_goes_with_its_last_graph() -> None:
    """And with it statistics of every linear, or a calibration."""
    model = ReluMLP()
    calibration = qcompile.calibrate(model, [torch.randn(2, 16)])
    gone = weakref.ref(calibration)
    call = compiled(model, calibration=calibration)
    run(call, torch.randn(2, 16))
    del calibration
    gc.collect()
    assert gone() is not None
    torch._dynamo.reset()
    del call, model
    gc.collect()
    assert gone() is None


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
def test_caches_are_used_and_not_mixed_up_with_inductors(tmp_path: Path) -> None:
    order = ("inductor", "w8a8")
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
    }
    for arguments, hits in ((order, 0), (order[::-1], 1)):
        printed = run_python(CACHED, *arguments, **caches).splitlines()
        assert [line for line in printed if line.startswith("ran")] == [f"ran {name} True {hits}" for name in arguments]
        assert float(printed[-1].removeprefix("differ by")) > 1e-3


def test_a_call_keeps_its_binding_whatever_other_threads_do() -> None:
    """Two models may share a graph, and two threads call it: what one has checked is what it gets."""
    graph = object.__new__(backend.CompiledGraph)

    class Fitting:
        def fits(self, parameters: list[Tensor]) -> bool:
            graph._binding = None  # another thread
            return True

    mine: Any = Fitting()
    graph._parameters, graph._binding = list, mine
    assert graph._bind([]) is mine


@pytest.mark.inductor
@pytest.mark.filterwarnings("ignore:fp8 on CPU")
@pytest.mark.parametrize("activations", ["token", "tensor"])
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_infinite_data_becomes_nan(dtype: str, inner: str, activations: str) -> None:
    model, x = nn.Linear(40, 24), torch.randn(5, 40)
    x[1, 3], x[3, 20] = torch.inf, -torch.inf
    broken = torch.tensor([False, True, False, True, False])
    options = {"dtype": dtype, "inner": inner, "activations": activations}
    with torch.no_grad():
        y = torch.compile(model, backend="w8a8", options=options)(x)
    assert torch.equal(y.isnan(), (broken | (activations == "tensor"))[:, None].expand(5, 24))
    assert y[~broken].isfinite().all() or activations == "tensor"
