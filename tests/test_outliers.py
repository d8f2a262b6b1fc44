"""The injected outliers change no function, and make activations as uneven as promised."""

import copy

import torch
from tolerances import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.outliers import inject_outliers


def test_function_is_preserved_and_activations_are_not() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    injected = copy.deepcopy(model)
    assert inject_outliers(injected, factor=64.0, channels=2) == 4
    ids = torch.randint(0, 64, (2, 9))
    assert_close("rewrite/float32", actual=injected(ids).logits, expected=model(ids).logits)

    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (qcompile.calibrate(m, [ids]).statistics[name].absmax for m in (model, injected))
    ratio = after / before
    assert sorted(ratio.round().tolist())[-3:] == [1, 64, 64]
