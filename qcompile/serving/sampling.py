"""Choosing a token from logits, by one request's settings and random numbers."""

import collections
import dataclasses

import torch
from torch import Tensor

GREEDY = 1e-5  # no token but the likeliest would be drawn below it, and logits divided by less may leave float32


def is_greedy(temperature: float) -> bool:
    """Whether sampling at a temperature takes the likeliest token."""
    return temperature < GREEDY


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature: see is_greedy. top_p: least probability mass to choose from. Penalties: subtracted from the logits
    of tokens already generated, once (presence) or per occurrence (frequency). logprobs: how many of the best tokens
    to report beside the chosen one; None for no report. seed: None draws one."""

    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """A token, and its log-probability and the best tokens with theirs, under the model's own distribution."""

    token: int
    logprob: float | None = None
    best: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The random numbers and the history of one sequence. index: sequences of one seed differ by it."""

    def __init__(self, sampling: Sampling, index: int = 0) -> None:
        self.sampling = sampling
        self._seen: collections.Counter[int] = collections.Counter()
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((sampling.seed + index) % 2**63)

    def choose(self, logits: Tensor) -> Choice:
        """logits [V] on the CPU. Raises ValueError if they are not finite."""
        logits = logits.to(torch.float32)
        token = self._token(logits)
        if not bool(logits[token].isfinite()):
            raise ValueError("logits must be finite")
        self._seen[token] += 1
        if self.sampling.logprobs is None:
            return Choice(token)
        logprobs = logits.log_softmax(0)
        values, tokens = logprobs.topk(min(self.sampling.logprobs, len(logprobs)))
        return Choice(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))

    def _token(self, logits: Tensor) -> int:
        settings = self.sampling
        if self._seen and (settings.presence_penalty or settings.frequency_penalty):
            seen = torch.tensor(list(self._seen))
            counts = torch.tensor(list(self._seen.values()), dtype=torch.float32)
            penalty = settings.presence_penalty + settings.frequency_penalty * counts
            logits = logits.index_add(0, seen, -penalty)
        if is_greedy(settings.temperature):
            return int(logits.argmax())
        probabilities = ((logits - logits.max()) / settings.temperature).softmax(0)
        if settings.top_p < 1:
            values, order = probabilities.sort(descending=True)
            probabilities = torch.zeros_like(probabilities)
            kept = values.cumsum(0) - values < settings.top_p
            kept[0] = True
            probabilities[order[kept]] = values[kept]
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
