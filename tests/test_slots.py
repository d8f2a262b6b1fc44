"""Slots: equal to the model itself, whatever the neighbours do, and without a compilation after warming up."""

import pytest
import torch
from checkpoints import llama, quantized
from torch import Tensor

from qcompile.errors import ConfigError
from qcompile.slots import Slots, buckets

PROMPT = [5, 9, 2, 30, 7]


@pytest.fixture(scope="module")
def slots() -> Slots:
    made = Slots(quantized(), slots=3, length=24, inner="eager")
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


def test_tokens_are_the_models_own(slots: Slots) -> None:
    """By the rule for different shapes: each token is within 0.1 logit of the model's best."""
    sequence = list(PROMPT)
    for logits in steps(slots, 2, 11):
        with torch.no_grad():
            ours = quantized()(input_ids=torch.tensor([sequence])).logits[0, -1]
        token = int(logits.argmax())
        assert float(ours.max() - ours[token]) <= 0.1
        sequence.append(token)


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
