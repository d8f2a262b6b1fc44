"""Mixtures of experts through torch.compile: every stack in 8 bits, whatever wrote it."""

from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    StaticCache,
)

import qcompile
from qcompile.model_limits import cache_name
from qcompile.quantized_experts import quantized_experts
from qcompile.weights import STORE

# transformers asks for torch's version where Dynamo traces it.
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Every token meets every expert: a pick that a rounding elsewhere may change is no matter of these tests."""
    torch.manual_seed(0)
    made: Any = {
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=4)),
        "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(
            **SMALL, num_experts=6, num_experts_per_tok=6, moe_intermediate_size=32, shared_expert_intermediate_size=48,
        )),
        "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(
            **SMALL, num_local_experts=4, num_experts_per_tok=4, head_dim=16,
        )),
    }[kind]()  # fmt: skip
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "experts" in name:  # so that they weigh as much as what they are added to
                parameter.normal_(0, 0.3)
    return made.eval().requires_grad_(False).to(dtype)


def call(function: Any, ids: Tensor = IDS, **keywords: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = function(ids, **keywords).logits
    return logits


def products(explained: Any) -> dict[str, str]:
    return {row.name: row.kernel for row in explained.rows if "experts." in row.name}


@pytest.mark.parametrize(("kind", "dtype"), [
    ("mixtral", torch.bfloat16), ("qwen2_moe", torch.float32), ("gpt_oss", torch.bfloat16),
])  # fmt: skip
def test_experts_are_quantized_and_close(kind: str, dtype: torch.dtype) -> None:
    """The verifier holds every product, experts' too, to the bound of its scales, and smoothing to be exact."""
    subject = model(kind, dtype)
    calibration = qcompile.calibrate(subject, [IDS])
    stacks = [name for name in calibration.statistics if "experts." in name]
    assert len(stacks) == 2 * 2
    options = {"calibration": calibration, "verify": True, "inner": "eager"}
    quantized = call(torch.compile(subject, backend="w8a8", options=options))
    assert_close("int8/model", actual=quantized, expected=call(subject))
    found = products(qcompile.explain(subject))
    assert sorted(found) == sorted(stacks)
    assert all(found.values())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_gathered_experts_are_the_same_products(kind: str) -> None:
    """transformers decodes with `batched_mm` on GPUs: prefill and decode must share weights, and agree."""
    subject = model(kind)
    calibration = qcompile.calibrate(subject, [IDS])
    found, computed = [], []
    for implementation in ("grouped_mm", "batched_mm"):
        subject.set_experts_implementation(implementation)
        options = {"calibration": calibration, "inner": "eager", "verify": True}
        compiled = torch.compile(subject, backend="w8a8", options=options)
        found.append(call(compiled))
        assert len(products(qcompile.explain(subject))) == 4
        computed.append(STORE.computed)
    assert computed[0] == computed[1]
    assert_close("rewrite/float32", actual=found[1], expected=found[0])


@pytest.mark.inductor
def test_inductor_agrees_with_eager() -> None:
    subject = model("qwen2_moe")
    calibration = qcompile.calibrate(subject, [IDS])
    found = {}
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        found[inner] = torch.compile(subject, backend="w8a8", options={"calibration": calibration, "inner": inner})
        found[inner] = call(found[inner])
    assert_close("inductor/float32", actual=found["inductor"], expected=found["eager"])


@pytest.mark.parametrize(
    "options", [{"activations": "tensor"}, {"activations": "static"}, {"alpha": "auto"}], ids=str
)
def test_other_schemes(options: dict[str, Any]) -> None:
    subject = model("mixtral")
    options = {"calibration": qcompile.calibrate(subject, [IDS]), "inner": "eager", "verify": True, **options}
    actual = call(torch.compile(subject, backend="w8a8", options=options))
    assert_close("int8/model", actual=actual, expected=call(subject))


def test_outlier_channels_are_smoothed_away() -> None:
    """A norm's gain that makes some of the experts' channels a hundred times the others'."""
    subject = model("mixtral")
    with torch.no_grad():
        for layer in subject.model.layers:
            layer.post_attention_layernorm.weight[3::16] *= 100
            layer.mlp.experts.gate_up_proj[..., 3::16] /= 100
            layer.mlp.gate.weight[:, 3::16] /= 100
    calibration, exact = qcompile.calibrate(subject, [IDS]), call(subject)

    def error(**options: Any) -> float:
        torch._dynamo.reset()
        found = call(torch.compile(subject, backend="w8a8", options={"inner": "eager", **options}))
        return float((found - exact).norm() / exact.norm())

    assert error(calibration=calibration) < error(calibration=calibration, alpha=None) / 4


def test_changed_experts_are_prepared_again() -> None:
    subject = model("mixtral")
    compiled = torch.compile(subject, backend="w8a8", options={"inner": "eager"})
    before = call(compiled)
    with torch.no_grad():
        subject.model.layers[1].mlp.experts.down_proj.mul_(-1)
    after = call(compiled)
    assert not torch.equal(before, after)
    assert_close("int8/model", actual=after, expected=call(subject))


def test_any_number_of_tokens() -> None:
    subject = model("mixtral")
    compiled = torch.compile(subject, backend="w8a8", dynamic=True, options={"inner": "eager"})
    for rows, tokens in ((2, 9), (1, 3), (3, 17)):
        ids = torch.randint(0, 64, (rows, tokens))
        assert_close("int8/model", actual=call(compiled, ids), expected=call(subject, ids))


def test_decode_with_a_static_cache_continues_prefill() -> None:
    subject = model("mixtral")
    compiled = torch.compile(subject, backend="w8a8", options={"inner": "eager"})
    whole = call(compiled, IDS[:1])
    name, cache = cache_name(subject.forward), StaticCache(config=subject.config, max_cache_len=16)
    call(compiled, IDS[:1, :8], **{name: cache})
    step = call(compiled, IDS[:1, 8:], position_ids=torch.tensor([[8]]), **{name: cache})
    assert_close("int8/slots", actual=step[:, -1], expected=whole[:, -1])


def test_a_stored_model_compiles_to_what_it_computes() -> None:
    stored = qcompile.quantize(model("qwen2_moe"), [IDS])
    assert len(quantized_experts(stored)) == 2
    assert not any("experts." in name for name in stored.qcompile_record.kept)
    stacks = [row.stored for row in qcompile.explain(stored).rows if "experts" in row.name]
    assert stacks == ["int8, per token"] * 4
    reason = stored.qcompile_record.kept["model.layers.0.mlp.shared_expert_gate"]
    assert reason == "it has one output, which engines that read folders keep in float (a gate)"
    expected = call(stored)
    for compiled in (stored, lambda ids: stored(ids)):  # the model itself, or a function that calls it
        actual = call(torch.compile(compiled, backend="w8a8", options={"inner": "eager"}))
        assert_close("rewrite/float32", actual=actual, expected=expected)


@pytest.mark.parametrize(("kind", "options", "said"), [
    ("gpt_oss", {}, "its stacks are stored as [E, K, N]"),
    ("mixtral", {"activations": "static"}, "experts have activations per token only"),
    ("mixtral", {"ignore": ("lm_head", "*experts")}, "its name matches an ignore pattern"),
])  # fmt: skip
def test_what_a_stored_model_keeps_in_float(kind: str, options: dict[str, Any], said: str) -> None:
    stored = qcompile.quantize(model(kind), [IDS], **options)
    kept = {name: reason for name, reason in stored.qcompile_record.kept.items() if "experts." in name}
    assert len(kept) == 4
    assert set(kept.values()) == {said}
    assert not quantized_experts(stored)
    reasons = {row.reason for row in qcompile.explain(stored).rows if "experts." in row.name}
    assert reasons == {"the model is already quantized, without this one"}
    compiled = torch.compile(stored, backend="w8a8", options={"inner": "eager"})
    assert_close("rewrite/float32", actual=call(compiled), expected=call(stored))
