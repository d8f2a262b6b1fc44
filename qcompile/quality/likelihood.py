"""How good a language model is on a text: windows, mean negative log-likelihood, tokens per second."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Score:
    """nll: mean negative log-likelihood per predicted token, in nats. tokens: how many were predicted."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)


def token_windows(tokenizer: Any, text: str, size: int, *, limit: int | None = None) -> Tensor:
    """Consecutive, non-overlapping windows [count, size] int64 of a text; the rest shorter than a window is left out.

    Raises ConfigError if the text is shorter than one window.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of windows must be at least 1; got {limit}")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // size if limit is None else min(limit, len(ids) // size)
    if not count:
        raise ConfigError(f"a text must fill one window of {size} tokens; got {len(ids)} tokens; give a longer text")
    return torch.tensor(ids[: count * size]).reshape(count, size)


def score(
    forward: Callable[..., Any], windows: Tensor, batch: int = 8, advance: Callable[[], None] = lambda: None
) -> Score:
    """Score a model's forward on windows [count, size], each predicted from its own beginning.

    Only whole batches are scored, so that a compiled forward meets one shape. `advance` is called after each batch.
    """
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids in _batches(windows, batch):
            total += float(_nll(forward(input_ids=ids, use_cache=False).logits, ids))
            tokens += ids.numel() - len(ids)
            advance()
    return Score(total / tokens, tokens)


def race(
    forwards: Mapping[str, Callable[..., Any]],
    ids: Tensor,
    rounds: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Tokens per second of each forward on one batch [count, size]: medians over rounds in which they take turns,
    so that a machine that slows down slows all of them. Everything must have been called before (compiled)."""
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    with torch.no_grad():
        for _ in range(rounds):
            for name, forward in forwards.items():
                started = time.perf_counter()
                forward(input_ids=ids, use_cache=False)
                seconds[name].append(time.perf_counter() - started)
            advance()
    return {name: ids.numel() / statistics.median(times) for name, times in seconds.items()}


def _batches(windows: Tensor, batch: int) -> Iterator[Tensor]:
    whole = len(windows) // batch
    if not whole:
        raise ConfigError(f"scoring needs one whole batch of {batch} windows; got {len(windows)}")
    yield from torch.split(windows[: whole * batch], batch)


def _nll(logits: Tensor, ids: Tensor) -> Tensor:
    flat = logits[:, :-1].float().reshape(-1, logits.shape[-1])
    return torch.nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1), reduction="sum")
