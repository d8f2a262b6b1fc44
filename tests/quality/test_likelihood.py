"""Scoring: windows, likelihood and speed, on models whose answer is known."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qcompile.errors import ConfigError
from qcompile.quality.likelihood import race, score, token_windows


class Letters:
    """A tokenizer of one token per character."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 32 for letter in text]}


def test_windows_do_not_overlap_and_leave_the_rest() -> None:
    windows = token_windows(Letters(), "abcdefghij", 4)
    assert windows.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert token_windows(Letters(), "abcdefghij", 4, limit=1).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(("text", "limit", "message"), [("abc", None, "got 3 tokens"), ("a" * 9, 0, "got 0")])
def test_nothing_to_score_is_one_line(text: str, limit: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        token_windows(Letters(), text, 4, limit=limit)


def uniform(vocabulary: int) -> Any:
    def forward(input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, vocabulary))

    return forward


def test_a_uniform_model_scores_the_logarithm_of_its_vocabulary() -> None:
    result = score(uniform(50), torch.randint(0, 50, (6, 9)), batch=2)
    assert result.nll == pytest.approx(math.log(50), rel=1e-6)
    assert result.perplexity == pytest.approx(50, rel=1e-5)
    assert result.tokens == 6 * 8


def test_a_model_that_knows_scores_zero() -> None:
    windows = torch.randint(0, 50, (4, 9))

    def oracle(input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        following = torch.nn.functional.one_hot(input_ids.roll(-1, 1), 50)
        return SimpleNamespace(logits=following * 100.0)

    assert score(oracle, windows, batch=2).nll == pytest.approx(0, abs=1e-6)


def test_fewer_windows_than_a_batch_is_one_line() -> None:
    with pytest.raises(ConfigError, match="batch of 8 windows; got 3"):
        score(uniform(5), torch.zeros(3, 4, dtype=torch.int64))


def test_race_takes_turns_and_gives_every_speed() -> None:
    order: list[str] = []

    def runner(name: str) -> Any:
        def forward(input_ids: torch.Tensor, use_cache: bool) -> None:
            order.append(name)

        return forward

    speeds = race({"a": runner("a"), "b": runner("b")}, torch.zeros(2, 8, dtype=torch.int64), rounds=3)
    assert order == ["a", "b"] * 3
    assert set(speeds) == {"a", "b"}
    assert all(speed > 0 for speed in speeds.values())
