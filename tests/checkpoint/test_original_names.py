"""What files call tensors that transformers fuses and renames."""

from typing import Any

import torch
import transformers as t

from qcompile.checkpoint.original_names import matrices_of, original_names

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def on_meta(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        return kind(config)


def test_a_stack_is_each_experts_matrices() -> None:
    config = t.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)
    model = on_meta(t.MixtralForCausalLM, config)
    place = "model.layers.1.block_sparse_moe.experts"
    down = matrices_of(model, "model.layers.1.mlp.experts.down_proj")
    assert down == {f"{place}.{expert}.w2": (32, 48) for expert in range(3)}
    up = matrices_of(model, "model.layers.1.mlp.experts.gate_up_proj")
    assert up == {f"{place}.{expert}.{name}": (48, 32) for expert in range(3) for name in ("w1", "w3")}


def test_scales_come_apart_as_weights_do() -> None:
    model = on_meta(t.MixtralForCausalLM, t.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2))
    stack = torch.arange(2 * 96.0).reshape(2, 96, 1)
    parts = original_names(model, {"model.layers.0.mlp.experts.gate_up_proj": stack})
    place = "model.layers.0.block_sparse_moe.experts"
    assert torch.equal(parts[f"{place}.1.w1.weight"], stack[1, :48])
    assert torch.equal(parts[f"{place}.0.w3.weight"], stack[0, 48:])


def test_a_stack_that_files_hold_whole_has_no_matrices() -> None:
    config = t.GraniteMoeConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)
    model = on_meta(t.GraniteMoeForCausalLM, config)
    assert matrices_of(model, "model.layers.0.block_sparse_moe.experts.gate_up_proj") == {}


def test_what_is_not_converted_keeps_its_name() -> None:
    model = on_meta(t.LlamaForCausalLM, t.LlamaConfig(**SIZES, vocab_size=64))
    tensors = {"model.norm.weight": torch.ones(32)}
    assert original_names(model, dict(tensors)).keys() == tensors.keys()
