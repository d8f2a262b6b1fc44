"""One variant of the GPU benchmark's model: what it answers, and the model itself, small and on a CPU."""

import functools
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import gpu_models
import gpu_rows
import gpu_variant


def test_a_model_answers_what_it_is_asked() -> None:
    class Model:
        def ready(self, case: str, layers: int) -> Any:
            if case == "prefill 2048":
                raise RuntimeError("out of\nmemory")
            return lambda: {"models": [float(layers)]}

    said: list[dict[str, Any]] = []
    cases = list(gpu_models.CASES)
    gpu_variant.answer_for(Model(), 2, cases, ["time\n", "time\n", "next\n", "time\n"], said.append)
    assert [list(word) for word in said] == [
        ["ready", "seconds"], ["times"], ["times"], ["failed", "error"], ["ready", "seconds"], ["times"]]  # fmt: skip
    assert said[1] == {"times": {"models": [2.0]}}
    assert said[3] == {"failed": "prefill 2048", "error": "RuntimeError: out of"}
    assert said[4]["ready"] == "decode, batch 32"
    said.clear()

    class Failing:
        def ready(self, case: str, layers: int) -> Any:
            return functools.partial(gpu_rows._fail, RuntimeError("an illegal\naddress"))

    gpu_variant.answer_for(Failing(), 2, cases, ["time\n", "time\n"], said.append)
    assert said[1:] == [{"failed": cases[0], "error": "RuntimeError: an illegal"}], "and no other case after that"
    said.clear()
    gpu_variant.answer_for(Model(), 2, cases[:1], ["time\n", "next\n"], said.append)
    assert [list(word) for word in said] == [["ready", "seconds"], ["times"]], "no other case than told"


def test_the_model_is_made_layer_by_layer() -> None:
    """Of the shape asked for, every layer of its own, converted once, and it runs with a cache."""
    converted: list[Any] = []
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": 64}  # fmt: skip
    model = gpu_variant.llama(3, converted.append, "cpu", **sizes)
    layers = list(model.model.layers)
    assert converted == layers
    assert len({id(layer) for layer in layers}) == 3
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2]
    weights = [layer.mlp.up_proj.weight for layer in layers]
    assert all(weight.dtype == torch.bfloat16 and 0.015 < weight.float().std() < 0.025 for weight in weights)
    assert not torch.equal(weights[0], weights[1])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    cache = gpu_variant.static_cache(model)
    with torch.no_grad():
        step = model(input_ids=torch.ones(2, 5, dtype=torch.long), past_key_values=cache)
        whole = model(input_ids=torch.ones(2, 5, dtype=torch.long), use_cache=False)
    assert len(cache.layers) == 3
    torch.testing.assert_close(step.logits, whole.logits, rtol=0.05, atol=0.05)
