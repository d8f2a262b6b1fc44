"""A stored model with its linears swapped for their originals: smoothing is taken into account, culprits are named."""

import copy
import functools
from typing import Any

import pytest
import torch
from checkpoints import IDS, llama
from subjects import THRESHOLD, WINDOWS, perturbed, subject
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import qcompile
from qcompile.bisection.bisect import bisect
from qcompile.bisection.swapped_linears import SwappedLinears
from qcompile.errors import ConfigError
from qcompile.quantized_linear import quantized_linears


@functools.cache
def _stored(activations: Any) -> Any:
    return qcompile.quantize(copy.deepcopy(subject()), [IDS, *WINDOWS.split(1)], activations=activations)


def stored(activations: str = "token") -> Any:
    return copy.deepcopy(_stored(activations))


def logits(model: SwappedLinears, linears: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.run_only(linears, {"input_ids": WINDOWS, "use_cache": False}).logits
    return found


def test_all_swapped_is_the_float_model_though_smoothing_is_folded() -> None:
    pair = SwappedLinears(stored(), subject())
    expected = subject()(input_ids=WINDOWS, use_cache=False).logits
    none, every = (float((logits(pair, names) - expected).norm() / expected.norm()) for names in ((), None))
    assert none < 5e-3
    assert none < every / 5


def test_all_quantized_is_the_model_itself_and_stays_it() -> None:
    model = stored()
    pair = SwappedLinears(model, subject())
    expected = model(input_ids=WINDOWS, use_cache=False).logits
    logits(pair, ())
    assert torch.equal(logits(pair, pair.linears), expected)
    assert torch.equal(logits(pair, None), expected)
    assert not any("forward" in vars(linear) for linear in quantized_linears(model).values())


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"])
def test_a_linear_with_a_wrong_scale_is_named(name: str) -> None:
    found = bisect(perturbed(stored("static"), name, 100.0), WINDOWS, against=subject(), threshold=THRESHOLD)
    assert found.names == (name,)
    assert found.step is None
    assert found.rest is not None
    assert found.rest.kl < THRESHOLD < found.culprits[0].alone.kl


def test_another_parameter_is_not_blamed_on_a_linear() -> None:
    model = stored()
    with torch.no_grad():
        model.model.norm.weight[::2] *= 3
    found = bisect(model, WINDOWS, against=subject(), threshold=THRESHOLD)
    assert found.culprits == ()
    assert found.verdict.startswith("no linear costs the accuracy; other parameters")


def test_gpt2_whose_linears_lie_transposed() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=64)).eval()
    model.requires_grad_(False)
    original = copy.deepcopy(model)
    pair = SwappedLinears(qcompile.quantize(model, [IDS]), original)
    expected = original(input_ids=WINDOWS, use_cache=False).logits
    assert float((logits(pair, ()) - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("against", [llama(layers=1), nn.Linear(2, 2)])
def test_another_model_is_no_original(against: Any) -> None:
    with pytest.raises(ConfigError, match="^against must be the float model this one was made from; for model.layers."):
        SwappedLinears(stored(), against)


def test_a_float_model_has_nothing_to_swap() -> None:
    with pytest.raises(ConfigError, match="has no quantized linear"):
        SwappedLinears(subject(), subject())


def test_before_any_step_nothing_is_quantized() -> None:
    pair = SwappedLinears(stored(), subject())
    assert pair.steps == ()
    first = pair.run_first(0, {"input_ids": WINDOWS, "use_cache": False}).logits
    assert torch.equal(first, logits(pair, ()))
    assert not torch.equal(first, logits(pair, None))
