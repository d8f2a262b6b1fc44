"""Smoothing through the whole backend: alpha="auto", powers of two, heads tied to embeddings."""

from typing import Any

import pytest
import torch
from compiling import compiled
from graphs import Attention, GatedMLP, ReluMLP

import qcompile
from qcompile.validate import relative_error


@pytest.mark.parametrize("power_of_two", ["off", "absorb", "drop"])
@pytest.mark.parametrize("alpha", [0.5, "auto"])
@pytest.mark.parametrize("kind", [GatedMLP, Attention, ReluMLP])
def test_every_way_to_smooth_is_better_than_none_on_outliers(kind: Any, alpha: Any, power_of_two: str) -> None:
    model, x = kind().eval().requires_grad_(False), torch.randn(4, 5, 16)
    with torch.no_grad():
        model.norm.weight[3] *= 100
        for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1"):
            if hasattr(model, name):
                getattr(model, name).weight[:, 3] /= 100
        exact = model(x)
    calibration = qcompile.calibrate(model, [{"x": x}])
    options = {"calibration": calibration, "alpha": alpha, "power_of_two": power_of_two, "verify": True}
    with torch.no_grad():
        smoothed, plain = compiled(model, **options)(x), compiled(model)(x)
    assert relative_error(smoothed, exact) < 0.5 * relative_error(plain, exact)


def test_a_tied_head_stays_in_float_by_default() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = compiled(model)(input_ids=ids, use_cache=False).logits
        expected = model.lm_head(compiled(model.model)(input_ids=ids, use_cache=False).last_hidden_state)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_a_model_smoothed_in_place_fills_and_reads_its_own_caches(cache: str) -> None:
    """The value projections are scaled, so the cache holds other numbers; prefill and decode agree on them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, initializer_range=0.3, eos_token_id=None)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    ids = torch.arange(1, 9)[None]
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    before = model.generate(ids, cache_implementation=cache, **settings)
    values = model.model.layers[0].self_attn.v_proj.weight.clone()
    qcompile.smooth(model, qcompile.calibrate(model, [ids]))
    assert not torch.equal(model.model.layers[0].self_attn.v_proj.weight, values)
    after = model.generate(ids, cache_implementation=cache, **settings)
    assert torch.equal(before.sequences, after.sequences)
    assert relative_error(torch.stack(after.logits), torch.stack(before.logits)) < 1e-5


@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.float32).min])
def test_a_mask_between_linears_takes_no_scale(fill: float) -> None:
    class Masked(ReluMLP):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.where(torch.arange(24) % 3 == 0, fill, 0.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(torch.relu(self.fc1(self.norm(x)) + self.mask))

    model, x = Masked().eval().requires_grad_(False), torch.randn(4, 16)
    calibration = qcompile.calibrate(model, [{"x": x}])
    with torch.no_grad():
        assert relative_error(compiled(model, calibration=calibration)(x), model(x)) < 0.05


def test_a_parameter_that_is_passed_is_data() -> None:
    model, x = ReluMLP().eval().requires_grad_(False), torch.nn.Parameter(torch.randn(4, 16), requires_grad=False)
    call = compiled(model)
    with torch.no_grad():
        first, second = call(x), call(torch.nn.Parameter(x * 3, requires_grad=False))
        assert relative_error(first, model(x)) < 0.05
        assert relative_error(second, model(x * 3)) < 0.05


def test_a_model_on_the_meta_device_is_one_line() -> None:
    model = ReluMLP().to("meta").eval().requires_grad_(False)
    with pytest.raises(qcompile.QCompileError, match="this one is on the meta device"), torch.no_grad():
        compiled(model)(torch.randn(4, 16, device="meta"))


def test_torchs_fused_encoder_layers_are_named() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(2, 5, 16)
    with torch.no_grad(), pytest.raises(qcompile.QCompileError, match="set_fastpath_enabled"):
        compiled(layer)(x)
    torch._dynamo.reset()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            assert 0 < relative_error(compiled(layer)(x), layer(x)) < 0.05
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
