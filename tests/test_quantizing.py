"""quantize in place: what becomes of linears and of what is left, on models of every kind."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IDS, llama, logits, quantized
from graphs import Attention, Broken, BrokenUp, GatedMLP, PostNorm, ReluMLP
from subjects import DropBias
from tolerances import assert_close
from torch import Tensor, nn

import qcompile
from qcompile import debug, passes
from qcompile.config import Config
from qcompile.errors import CalibrationError, ConfigError, VerifyError, WeightError
from qcompile.pass_pipeline import Pipeline
from qcompile.quantized_linear import QuantizedLinear, quantized_linears
from qcompile.validate import relative_error


def noisy(kind: Callable[[], nn.Module]) -> nn.Module:
    model = kind().eval()
    with torch.no_grad():
        model.get_parameter("norm.weight")[::5] *= 30
    return model


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x)
    return y


@pytest.mark.parametrize("kind", [GatedMLP, Attention, ReluMLP, PostNorm])
def test_the_function_stays_within_quantization(kind: type[nn.Module]) -> None:
    model, x = noisy(kind), torch.randn(2, 5, 16)
    expected = run(model, x)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert qcompile.quantize(model, [x]) is model
    assert set(quantized_linears(model)) == linears
    assert_close("int8/model", actual=run(model, x), expected=expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_smoothing_is_folded_and_what_cannot_be_is_said() -> None:
    model, x = noisy(PostNorm), torch.randn(2, 5, 16)
    before = copy.deepcopy(model)
    qcompile.quantize(model, [x])
    record: Any = model.qcompile_record
    assert set(record.unsmoothed) == {"fc1", "fc2"}
    assert torch.equal(model.get_parameter("norm.weight"), before.get_parameter("norm.weight"))
    other = noisy(GatedMLP)
    gain = other.get_parameter("norm.weight").detach().clone()
    qcompile.quantize(other, [x])
    assert not torch.equal(other.get_parameter("norm.weight"), gain)
    assert not other.qcompile_record.unsmoothed  # type: ignore[union-attr]


def test_smoothing_helps_where_there_are_outliers() -> None:
    x = torch.randn(4, 9, 16)
    errors = {}
    for alpha in (None, 0.5, "auto"):
        model = noisy(GatedMLP)
        expected = run(model, x) - x
        qcompile.quantize(model, [x], alpha=alpha)  # type: ignore[arg-type]
        errors[alpha] = float((run(model, x) - x - expected).norm() / expected.norm())
    assert errors[0.5] < errors[None] / 1.5
    assert errors["auto"] < errors[None] / 1.5


@pytest.mark.parametrize("load", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scales_are_those_that_the_models_dtype_can_hold(load: torch.dtype) -> None:
    model = quantized("int8", "static", load)
    for linear in quantized_linears(model).values():
        for scale in (linear.weight_scale, linear.input_scale):
            assert scale is not None
            assert scale.dtype == torch.float32
            assert torch.equal(scale.to(load).to(torch.float32), scale)
        assert int(linear.weight.abs().max()) == 127


def test_siblings_share_one_input_scale() -> None:
    model = quantized(activations="static")
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert attention.q_proj.input_scale is attention.k_proj.input_scale is attention.v_proj.input_scale
    assert mlp.gate_proj.input_scale is mlp.up_proj.input_scale
    assert mlp.down_proj.input_scale is not mlp.up_proj.input_scale


@pytest.mark.parametrize("clip", ["percentile", "mse"])
def test_clipped_ranges_are_no_wider_and_equal_for_siblings(clip: str) -> None:
    whole = quantized(activations="static")
    cut = qcompile.quantize(llama(), [IDS, IDS.flip(1)], activations="static", clip=clip)  # type: ignore[arg-type]
    attention = cut.get_submodule("model.layers.0.self_attn")
    assert attention.q_proj.input_scale is attention.v_proj.input_scale
    for name, linear in quantized_linears(cut).items():
        full = quantized_linears(whole)[name].input_scale
        assert linear.input_scale is not None
        assert full is not None
        assert float(linear.input_scale) <= float(full)


def test_the_head_stays_in_float_unless_asked_and_is_untied_then() -> None:
    model = quantized()
    assert model.qcompile_record.kept == {"lm_head": "its name matches an ignore pattern"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    whole = qcompile.quantize(llama(), [IDS], ignore=())
    assert isinstance(whole.lm_head, QuantizedLinear)
    assert whole.model.embed_tokens.weight.is_floating_point()  # type: ignore[union-attr]
    assert whole.config.tie_word_embeddings is False  # type: ignore[union-attr]


def test_compiling_it_gives_the_eager_numbers() -> None:
    model = quantized()
    fast = torch.compile(model, backend="w8a8", options={"inner": "eager"})
    assert_close("rewrite/float32", actual=logits(fast), expected=logits(model))


class Odd(nn.Module):
    """Linears that no module of their own computes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.read = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.matrix = nn.Parameter(torch.randn(16, 16))
        self.hooked = nn.Linear(16, 16)
        self.hooked.register_forward_hook(lambda module, inputs, output: output * 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.fc(h) + nn.functional.linear(h, self.read.weight) + h @ self.matrix + self.hooked(h)


def test_linears_without_a_module_of_their_own_stay_in_float() -> None:
    model, x = Odd().eval(), torch.randn(3, 16)
    expected = run(model, x)
    qcompile.quantize(model, [x])
    assert set(quantized_linears(model)) == {"fc"}
    assert len(model.qcompile_record.kept) == 3  # type: ignore[arg-type, union-attr]
    assert "forward hooks" in model.qcompile_record.kept["hooked"]  # type: ignore[index, union-attr]
    assert_close("int8/model", actual=run(model, x), expected=expected)


@pytest.mark.filterwarnings("ignore:fp8 on CPU")
def test_t5_casts_to_a_dtype_of_8_bits_unless_it_is_int8() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    call = {"input_ids": IDS, "decoder_input_ids": IDS}
    for dtype, kept in (("int8", 0), ("fp8", 2)):
        model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
        with torch.no_grad():
            expected = model(**call).logits
            qcompile.quantize(model, [call], dtype=dtype)  # type: ignore[arg-type]
            assert_close(f"{dtype}/model", actual=model(**call).logits, expected=expected)
        linears = [name for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"]
        assert len(linears) == kept
        assert all(name.endswith("DenseReluDense.wo") for name in linears)


class Twice(nn.Module):
    """One module that is called on two inputs of different range."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x)) + self.fc(self.norm(x + 1) * 10)


def test_a_module_called_twice_gets_the_larger_range() -> None:
    model, x = Twice().eval(), torch.randn(8, 16)
    expected = run(model, x)
    qcompile.quantize(model, [x], activations="static")
    assert_close("int8/model", actual=run(model, x), expected=expected)


def broken_up(**options: Any) -> nn.Module:
    model = BrokenUp(**options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter[::5] *= 30
    return model


@pytest.mark.parametrize("options", [{}, {"alpha": None}, {"activations": "static"}, {"dtype": "fp8"}], ids=str)
def test_a_model_in_several_graphs_becomes_what_it_would_in_one(options: dict[str, Any]) -> None:
    """Nothing is smoothed across its breaks anyway."""
    model, x = broken_up(), torch.randn(8, 16)
    whole = copy.deepcopy(model)
    whole.uncompiled = lambda x: x
    expected = run(model, x)
    qcompile.quantize(model, [x], **options)
    qcompile.quantize(whole, [x], **options)
    assert quantized_linears(model).keys() == {f"{part}.{fc}" for part in ("first", "second") for fc in ("fc1", "fc2")}
    assert model.qcompile_record == whole.qcompile_record
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())
    assert_close(f"{options.get('dtype', 'int8')}/model", actual=run(model, x), expected=expected)


class Shares(nn.Module):
    """In the first graph `b` shares an input with `a`, in the second it reads larger numbers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) + self.b(x)
        torch._dynamo.graph_break()
        return self.b(10 * h)


def test_a_module_called_in_two_graphs_gets_the_larger_range() -> None:
    model, x = Shares().eval(), torch.randn(8, 16)
    with torch.no_grad():
        ranges = [x, 10 * (model.a(x) + model.b(x))]
    expected = run(model, x)
    qcompile.quantize(model, [x], activations="static", alpha=None)
    for name, largest in zip("ab", ranges, strict=True):
        scale = quantized_linears(model)[name].input_scale
        torch.testing.assert_close(scale, largest.abs().max().reshape(1) / 127, rtol=1e-5, atol=0)
    assert_close("int8/model", actual=run(model, x), expected=expected)


def test_layers_that_share_a_graph_are_each_quantized() -> None:
    model, x = Broken().eval(), torch.randn(8, 16)
    expected = run(model, x)
    qcompile.quantize(model, [x])
    assert quantized_linears(model).keys() == {f"layers.{i}.{fc}" for i in range(3) for fc in ("fc1", "fc2")}
    assert_close("int8/model", actual=run(model, x), expected=expected)


def test_a_quantized_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="is already quantized; quantize the float model"):
        qcompile.quantize(quantized(), [IDS])


def test_calibrating_a_quantized_model_is_refused() -> None:
    with pytest.raises(CalibrationError, match="already quantized"):
        qcompile.calibrate(quantized(), [IDS])


@pytest.mark.parametrize(
    ("options", "error"),
    [({"dtype": "int4"}, "dtype must be"), ({"activations": "tensor"}, '"token" or "static"'), ({"alpha": 2}, "alpha"),
     ({"clip": "mse"}, "cuts static ranges"), ({"ignore": ("*",)}, "GatedMLP has no linear")],
)  # fmt: skip
def test_mistakes_change_nothing(options: dict[str, Any], error: str) -> None:
    model, x = noisy(GatedMLP), torch.randn(2, 16)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(qcompile.QCompileError, match=error):
        qcompile.quantize(model, [x], **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_models_calibration_is_refused() -> None:
    model, x = noisy(GatedMLP), torch.randn(2, 16)
    found = qcompile.calibrate(model, [x])
    with pytest.raises(CalibrationError, match="does not belong to this model"):
        qcompile.quantize(GatedMLP(), found)


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_changed() -> None:
    model, x = noisy(GatedMLP), torch.randn(2, 16)
    found = qcompile.calibrate(model, [x])
    with torch.no_grad():
        model.get_parameter("down_proj.weight")[3, 4] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WeightError, match=r"down_proj\.weight has NaN or Inf"):
        qcompile.quantize(model, found, alpha=None)
    assert not quantized_linears(model)
    assert all(torch.equal(v.nan_to_num(9), before[n].nan_to_num(9)) for n, v in model.state_dict().items())


def test_static_ranges_need_values() -> None:
    model = noisy(GatedMLP)
    with torch.no_grad():
        model.get_parameter("norm.weight").zero_()
    with pytest.raises(CalibrationError, match="saw only zeros"):
        qcompile.quantize(model, [torch.randn(2, 16)], activations="static")


def test_it_is_watched_as_qcompile_debug_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A pass that is wrong is found out by its numbers, before anything is written."""
    monkeypatch.chdir(tmp_path)
    model = noisy(ReluMLP)
    calibration = qcompile.calibrate(model, [torch.randn(2, 16)])
    *first, last = passes.storing(Config(calibrate=1)).passes
    monkeypatch.setattr(passes, "storing", lambda config, keep: Pipeline((*first, DropBias(), last)))
    monkeypatch.setenv(debug.VARIABLE, "dump,verify")
    with torch.no_grad():
        model.get_parameter("fc1.bias").fill_(0.5)
    with pytest.raises(VerifyError, match="pass drop_bias must be exact"):
        qcompile.quantize(model, calibration)
    assert not quantized_linears(model)
    assert (tmp_path / debug.DEFAULT_FOLDER / "graph-000" / "04.quantize_linears.diff").is_file()


@pytest.mark.parametrize("activations", ["token", "static"])
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_it_stands_verification(activations: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(debug.VARIABLE, "verify")
    qcompile.quantize(llama(), [IDS], activations=activations, dtype=dtype)


class Holder:
    """No module, but it calls one."""

    def __init__(self, norm: nn.Module, fc: nn.Module) -> None:
        self.norm, self.fc = norm, fc

    def __call__(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x))


class Held(nn.Module):
    def __init__(self, *, several: bool) -> None:
        super().__init__()
        self.norm, self.fc, self.out, self._several = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16), several
        self.__dict__["held"] = Holder(self.norm, self.fc)
        self.alias = self.out

    def forward(self, x: Tensor) -> Tensor:
        h = self.held(x)
        if self._several:
            torch._dynamo.graph_break()
        y: Tensor = self.alias(torch.relu(h))
        return y


@pytest.mark.parametrize("several", [False, True])
def test_a_linear_is_quantized_wherever_it_is_held(several: bool) -> None:
    model, x = noisy(lambda: Held(several=several)), torch.randn(4, 16)
    expected = run(model, x)
    plain = qcompile.quantize(copy.deepcopy(model), [x], alpha=None)
    qcompile.quantize(model, [x])
    assert model.out is model.alias
    assert isinstance(model.out, QuantizedLinear)
    for changed in (plain, model):
        assert 1e-4 < relative_error(run(changed, x), expected) < 6e-2


def test_what_code_has_set_on_a_linear_stays() -> None:
    class Multiplies(ReluMLP):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x) * self.fc2.multiplier
            return y

    model, x = Multiplies().eval(), torch.randn(4, 16)
    model.fc2.multiplier = 3.0
    expected = run(model, x)
    qcompile.quantize(model, [x])
    assert not model.fc2.training
    assert_close("int8/model", actual=run(model, x), expected=expected)


def test_names_that_look_like_patterns() -> None:
    """What stays in float is kept by its very name."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"a[0]": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
            self.inner = nn.ModuleDict({"fc": nn.Linear(16, 16)})
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = self.parts["b"](torch.relu(self.parts["a[0]"](x))) + self.parts["a[0]"].weight[:4]
            y: Tensor = self.fc(torch.tanh(self.inner["fc"](h))) + self.fc.weight[:4]
            return y

    model, x = Named().eval(), torch.randn(4, 16)
    qcompile.quantize(model, [x])
    assert quantized_linears(model).keys() == {"parts.b", "inner.fc"}
    assert model.qcompile_record.kept.keys() == {"parts.a[0]", "fc"}
    assert all(reason.startswith("its weight is ") for reason in model.qcompile_record.kept.values())
