"""Experts in 8 bits as modules: what transformers' own forward computes, up to quantization, and what moves them."""

import copy
import pickle
from typing import Any

import pytest
import torch
from compiling import run_python
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig, Qwen2MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from qcompile.quantize_weight import quantize_weight
from qcompile.quantized_experts import become_quantized, quantized_experts, why_not_quantized

HIDDEN, INNER, EXPERTS = 32, 24, 5


def mixtral() -> Any:
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    module = MixtralExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, 0.2)
    return module.eval().requires_grad_(False)


def routed(tokens: int = 7, picks: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    weights, picked = torch.rand(tokens, EXPERTS, generator=random).topk(picks)
    return torch.randn(tokens, HIDDEN, generator=random), picked, weights


def quantized(module: Any, *stacks: str, dtype: torch.dtype = torch.int8) -> Any:
    module = become_quantized(copy.deepcopy(module))
    for stack in stacks:
        q, scale = quantize_weight(getattr(module, stack), [], "row", dtype)
        module.put(stack, q, scale.unsqueeze(-1))
    return module


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("picks", [1, 2, EXPERTS])
def test_with_no_stack_quantized_it_is_transformers_own(tokens: int, picks: int) -> None:
    module, arguments = mixtral(), routed(tokens, picks)
    torch.testing.assert_close(quantized(module)(*arguments), module(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("stacks", "dtype", "limit"), [
    (("gate_up_proj",), torch.int8, 2e-2), (("down_proj",), torch.int8, 2e-2),
    (("gate_up_proj", "down_proj"), torch.int8, 2e-2), (("gate_up_proj", "down_proj"), torch.float8_e4m3fn, 8e-2),
])  # fmt: skip
def test_stacks_in_8_bits(stacks: tuple[str, ...], dtype: torch.dtype, limit: float) -> None:
    module, arguments = mixtral(), routed()
    experts = quantized(module, *stacks, dtype=dtype)
    assert experts.quantized_stacks() == list(stacks)
    assert 1e-4 < error(experts(*arguments), module(*arguments)) < limit


@pytest.mark.parametrize("kind", [Qwen2MoeExperts, MixtralExperts])
def test_the_gate_is_the_classes_own(kind: type[nn.Module]) -> None:
    """A subclass of the class that it was, with its activation."""
    config = Qwen2MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS, hidden_act="gelu")
    module = Qwen2MoeExperts(config) if kind is Qwen2MoeExperts else mixtral()
    experts = become_quantized(module)
    assert isinstance(experts, kind)
    assert type(experts).__name__ == f"Quantized{kind.__name__}"
    assert type(become_quantized(copy.deepcopy(experts))) is type(experts)
    assert quantized_experts(nn.ModuleDict({"experts": experts})) == {"experts": experts}


def test_a_change_of_dtype_leaves_8_bits_and_scales_alone() -> None:
    experts = quantized(mixtral(), "gate_up_proj", dtype=torch.float8_e4m3fn)
    before = experts.gate_up_proj.data.clone()
    experts.bfloat16()
    assert torch.equal(experts.gate_up_proj.data.view(torch.int8), before.view(torch.int8))
    assert experts.gate_up_proj.dtype == torch.float8_e4m3fn
    assert experts.gate_up_proj_scale.dtype == torch.float32
    assert experts.down_proj.dtype == torch.bfloat16
    assert experts.to("meta").gate_up_proj.is_meta
    assert "5 experts, gate_up_proj fp8, token" in repr(experts)


def test_what_cannot_become_one() -> None:
    transposed = GptOssExperts(GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS))
    assert "[E, K, N]" in why_not_quantized(transposed)
    assert "how its experts are laid out" in why_not_quantized(nn.Linear(2, 2))
    hooked = mixtral()
    hooked.register_forward_hook(lambda *_: None)
    assert "hooks" in why_not_quantized(hooked)
    assert why_not_quantized(mixtral()) == why_not_quantized(become_quantized(mixtral())) == ""


def test_copies_and_pickles_are_of_the_same_class() -> None:
    experts, arguments = quantized(mixtral(), "gate_up_proj", "down_proj"), routed()
    for again in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert type(again) is type(experts)
        assert torch.equal(again(*arguments), experts(*arguments))


def test_a_process_that_loads_nothing_else_knows_the_operators() -> None:
    """As one does that reads a folder: until something else imported them, experts failed when called."""
    said = run_python(
        "import torch, qcompile.quantized_experts\n"
        "print(all(hasattr(torch.ops.qcompile, name) for name in ('grouped_linear', 'scaled_grouped_mm', 'quantize')))"
    )
    assert said.split()[-1] == "True"
