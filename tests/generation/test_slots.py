"""Slots: equal to the model itself, whatever the neighbours do, and without a compilation after warming up."""

import copy
from typing import Any

import pytest
import torch
from checkpoints import IDS, llama
from tolerances import assert_close
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.errors import ConfigError
from qcompile.generation.slots import Slots, buckets

PROMPT = [5, 9, 2, 30, 7]


@pytest.fixture(scope="module")
def model() -> Any:
    """Weights large enough for attention to matter: a wrong position or mask shows in the logits."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return qcompile.quantize(LlamaForCausalLM(config).eval(), [IDS, IDS.flip(1)])


@pytest.fixture(scope="module")
def slots(model: Any) -> Slots:
    made = Slots(copy.deepcopy(model), slots=3, length=24, inner="eager")
    made.warm_up()
    return made


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Not reset between tests here: the compiled slots are shared."""
    torch.manual_seed(0)


def test_buckets() -> None:
    assert buckets(100) == (100, 64, 32, 16)
    assert buckets(16) == (16,)
    assert buckets(5) == (5,)


def steps(slots: Slots, slot: int, neighbour: int) -> list[Tensor]:
    """Prompt and four greedy tokens in one slot, another token in all the others."""
    found = [slots.prefill(slot, PROMPT)]
    for step in range(4):
        tokens, positions = [neighbour] * 3, [step] * 3
        tokens[slot], positions[slot] = int(found[-1].argmax()), len(PROMPT) + step
        found.append(slots.decode(tokens, positions)[slot])
    return found


def test_a_row_does_not_depend_on_its_companions(slots: Slots) -> None:
    for one, other in zip(steps(slots, 1, 4), steps(slots, 1, 33), strict=True):
        assert torch.equal(one, other)


def test_logits_are_the_models_own(slots: Slots, model: Any) -> None:
    sequence = list(PROMPT)
    for found in steps(slots, 2, 11):
        with torch.no_grad():
            ours = model(input_ids=torch.tensor([sequence])).logits[0, -1]
        assert_close("int8/slots", actual=found, expected=ours)
        sequence.append(int(found.argmax()))


def test_nothing_compiles_after_warming_up(slots: Slots) -> None:
    assert slots.compilations.count == len(slots.lengths) + 1
    for length in (1, 15, 16, 17, 24):
        slots.prefill(0, [3] * length)
    assert slots.compilations.count == len(slots.lengths) + 1


def test_a_decode_that_does_not_continue_is_refused(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "decode", lambda tokens, positions: Slots.decode(slots, tokens, [0] * 3).flip(1))
    with pytest.raises(ConfigError, match="continues its prefill"):
        slots._check()


def test_unknown_layers_are_refused() -> None:
    model = llama()
    model.config.layer_types = ["linear_attention"]
    with pytest.raises(ConfigError, match="got linear_attention"):
        Slots(model, 1, 8, "eager")


def test_a_prompt_that_overflowed_leaves_nothing_to_the_next(slots: Slots) -> None:
    """The mask is added, and NaN stays NaN whatever is added."""
    expected = steps(slots, 1, 0)
    for layer in slots._stored:
        layer.keys[1], layer.values[1] = float("nan"), float("inf")
    assert all(map(torch.equal, steps(slots, 1, 0), expected))
