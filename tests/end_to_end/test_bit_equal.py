"""Powers of two: smoothing a bfloat16 model moves no bit of its output."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import qcompile

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "Qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "Qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=16)),
    "Mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES)),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, pad_token_id=0)
    ),
    "Mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4)),
}


def randomized(model: nn.Module) -> nn.Module:
    """In bfloat16, every gain and bias at some value of its own."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model.bfloat16().eval().requires_grad_(False)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # transformers' experts
@pytest.mark.parametrize("name", MODELS)
def test_smoothing_with_powers_of_two_moves_no_bit(name: str) -> None:
    torch.manual_seed(0)
    model = randomized(MODELS[name]())
    ids = torch.randint(1, 128, (2, 24))
    calibration = qcompile.calibrate(model, [ids])
    before = model(input_ids=ids, use_cache=False).logits
    rounded, general = copy.deepcopy(model), copy.deepcopy(model)
    qcompile.smooth(rounded, calibration, power_of_two=True)
    qcompile.smooth(general, calibration)
    assert changed(rounded, model) >= 4
    assert torch.equal(rounded(input_ids=ids, use_cache=False).logits, before)
    assert not torch.equal(general(input_ids=ids, use_cache=False).logits, before), "a general s rounds"


def changed(model: nn.Module, original: nn.Module) -> int:
    """How many parameters are scaled."""
    pairs = zip(model.parameters(), original.parameters(), strict=True)
    return sum(not torch.equal(left, right) for left, right in pairs)
