"""Each layer's own error: found under smoothing's scales, and only where it is."""

import copy
from typing import Any

import pytest
import torch
from checkpoints import IDS, llama, quantized
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.quality.layer_errors import layer_sqnr, rank_one_ratio
from qcompile.quantized_linear import quantized_linears


def test_every_quantized_linear_has_its_figure() -> None:
    model = quantized()
    found = layer_sqnr(model, llama(), IDS)
    assert set(found) == set(quantized_linears(model))
    assert all(25 < value < 60 for value in found.values()), found


@pytest.mark.parametrize("activations", ["token", "static"])
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_scales_common_to_all_channels_are_found(activations: Any, bias: float) -> None:
    """Smoothing gives each linear's columns a common factor here, which a bias and a static scale show."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        attention_bias=True, mlp_bias=True, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=bias)
            elif name.endswith("layernorm.weight"):
                parameter *= 50
                parameter[::7] *= 20
    smoothed = qcompile.quantize(copy.deepcopy(model), [IDS, IDS.flip(1)], activations=activations)
    found = layer_sqnr(smoothed, model, IDS)
    assert len(found) == 14
    assert all(25 < value < 60 for value in found.values()), found


def test_a_spoiled_layer_stands_out_alone() -> None:
    model = quantized()
    name = "model.layers.0.mlp.up_proj"
    before = layer_sqnr(model, llama(), IDS)
    linear = quantized_linears(model)[name]
    with torch.no_grad():
        linear.weight[::3] = 0
    after = layer_sqnr(model, llama(), IDS)
    assert min(after, key=after.__getitem__) == name
    assert after[name] < before[name] - 15
    assert all(after[other] == pytest.approx(value) for other, value in before.items() if other != name)


def test_the_float_model_is_left_as_it_was() -> None:
    model = llama()
    before = copy.deepcopy(model.state_dict())
    layer_sqnr(quantized(), model, IDS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_row_and_column_scales_are_found_under_noise() -> None:
    weight = torch.randn(40, 30)
    rows, columns = torch.rand(40) + 0.5, 10 ** (torch.rand(30) * 2 - 1)
    scaled = rows[:, None] * weight * columns
    r, c = rank_one_ratio(scaled + 1e-3 * torch.randn_like(scaled), weight)
    torch.testing.assert_close(r[:, None] * c, rows[:, None] * columns, rtol=2e-2, atol=2e-3)
    assert float(c.mean()) == pytest.approx(1)


def test_channels_of_zeros_have_scale_one() -> None:
    weight = torch.randn(4, 3)
    weight[:, 1] = 0
    r, c = rank_one_ratio(weight.clone(), weight)
    assert torch.isfinite(r).all()
    assert (c > 0).all()
