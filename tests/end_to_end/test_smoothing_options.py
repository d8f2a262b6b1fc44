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
