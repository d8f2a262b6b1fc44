"""Replacing stacks of experts: the operator's numbers, every float stack let go, and nothing changed by a mistake."""

import gc
import weakref
from typing import Any

import pytest
import torch
from checkpoints import IDS
from transformers import MixtralConfig, MixtralForCausalLM

import qcompile
from qcompile.errors import WeightError
from qcompile.quantize_weight import quantize_weight

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


def mixtral(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    return MixtralForCausalLM._from_config(config, dtype=dtype).eval()


def test_unsmoothed_stacks_are_those_of_the_operator() -> None:
    model = mixtral()
    weight = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    qcompile.quantize(model, [IDS], alpha=None)
    q, scale = quantize_weight(weight, [], "row", torch.int8, torch.float32)
    experts = model.model.layers[0].mlp.experts
    assert torch.equal(experts.down_proj, q)
    assert torch.equal(experts.down_proj_scale[..., 0], scale)


def test_scales_are_what_the_models_dtype_holds() -> None:
    model = qcompile.quantize(mixtral(torch.bfloat16), [IDS])
    scale = model.model.layers[0].mlp.experts.gate_up_proj_scale
    assert scale.shape == (3, 96, 1)
    assert torch.equal(scale, scale.bfloat16().float())


def test_no_float_stack_is_left() -> None:
    model = mixtral()
    stacks = [weakref.ref(stack) for stack in model.model.layers[0].mlp.experts.parameters()]
    qcompile.quantize(model, [IDS])
    gc.collect()
    assert len(stacks) == 2
    assert all(stack() is None for stack in stacks)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_stack_that_is_not_finite_changes_nothing(value: float) -> None:
    model = mixtral()
    calibration = qcompile.calibrate(model, [IDS])
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[2, 3, 4] = value
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(WeightError, match=r"experts\.down_proj has NaN or Inf"):
        qcompile.quantize(model, calibration, alpha=None)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], parameter) or "down_proj" in name for name, parameter in before.items())
    assert after.keys() == before.keys()
