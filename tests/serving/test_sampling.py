"""Choosing tokens."""

import pytest
import torch

from qcompile.serving.sampling import Sampler, Sampling, is_greedy

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])


def test_greedy_and_its_report() -> None:
    choice = Sampler(Sampling(temperature=0, logprobs=2)).choose(LOGITS)
    assert choice.token == 1
    assert [token for token, _ in choice.best] == [1, 2]
    assert choice.logprob == pytest.approx(float(LOGITS.log_softmax(0)[1]))


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-46, 1e-37, 9e-6])
def test_next_to_no_temperature_is_greedy(temperature: float) -> None:
    assert is_greedy(temperature)
    sampler = Sampler(Sampling(temperature=temperature, seed=0))
    assert {sampler.choose(LOGITS * 1e4).token for _ in range(20)} == {1}


def test_a_small_temperature_is_one() -> None:
    assert not is_greedy(1e-5)
    sampler = Sampler(Sampling(temperature=1e-5, seed=0))
    assert {sampler.choose(torch.tensor([1.0, 1.0, 0.9])).token for _ in range(50)} == {0, 1}


def test_a_seed_repeats_and_copies_differ() -> None:
    def drawn(index: int) -> list[int]:
        sampler = Sampler(Sampling(seed=7), index)
        return [sampler.choose(LOGITS).token for _ in range(30)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_top_p_keeps_the_least_set() -> None:
    sampler = Sampler(Sampling(top_p=0.5, seed=0))
    assert {sampler.choose(LOGITS).token for _ in range(50)} == {1}


def test_frequencies_follow_temperature() -> None:
    sampler = Sampler(Sampling(temperature=2.0, seed=0))
    counts = torch.bincount(torch.tensor([sampler.choose(LOGITS).token for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(counts, (LOGITS / 2).softmax(0), atol=0.03, rtol=0)


def test_penalties_push_away_from_what_was_said() -> None:
    sampler = Sampler(Sampling(temperature=0, presence_penalty=2.0))
    assert [sampler.choose(LOGITS).token for _ in range(2)] == [1, 2]


def test_nan_is_an_error() -> None:
    with pytest.raises(ValueError, match="finite"):
        Sampler(Sampling(temperature=0)).choose(LOGITS * float("nan"))
