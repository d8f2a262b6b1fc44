"""How good a quantized model is: likelihood, distance from the float model, the worst layers, speed and memory."""

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.model_limits import check_same_tokens
from qcompile.quality.layer_errors import layer_sqnr
from qcompile.quality.window_calls import logits_of, window_call
from qcompile.strict_json import to_json

Forward = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """kl: mean KL(float ‖ quantized) in nats per token. top1: share of tokens whose most likely successor is the same.
    nll: of the float model. sqnr: per quantized linear, in dB."""

    nll: float
    kl: float
    top1: float
    sqnr: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """windows, size: non-overlapping windows of `size` tokens, each predicted from its own beginning (by an
    encoder–decoder model: its second half from the first). nll: mean over `tokens` predicted tokens.
    tokens_per_second: of whole windows, without the first call, which compiles. weight_bytes: all parameters and
    buffers. peak_bytes: of the process, so far."""

    windows: int
    size: int
    tokens: int
    nll: float
    tokens_per_second: float
    weight_bytes: int
    peak_bytes: int
    against: Comparison | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))

    def to_json(self) -> str:
        """Everything, as one JSON object; what is not finite is null."""
        return to_json(dataclasses.asdict(self) | {"perplexity": self.perplexity})


def evaluate_checkpoint(
    model: nn.Module,
    windows: Tensor,
    *,
    batch: int = 1,
    against: nn.Module | None = None,
    forward: Forward | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate a model on windows [count, size], a whole number of batches.

    forward: what runs instead of the model itself, such as its compiled call. against: the float model to compare with.
    `advance` is called after each batch. Raises ConfigError if a model gives no logits for every token, or
    the two know different tokens.
    """
    if against is not None:
        check_same_tokens(model, against)
    sums = Sums()
    seconds: list[float] = []
    forward = model if forward is None else forward
    with torch.no_grad():
        for ids in torch.split(windows, batch):
            call = window_call(model, ids)
            started = time.perf_counter()
            output = forward(**call.arguments)
            seconds.append(time.perf_counter() - started)
            other = None if against is None else logits_of(against, against(**call.arguments))
            sums.add(logits_of(model, output), call.read, other)
            advance()
    compared = None
    if against is not None:
        compared = Comparison(sums.other_nll, sums.kl, sums.top1, layer_sqnr(model, against, windows[:batch]))
    timed = seconds[1:] or seconds
    speed = batch * windows.shape[1] * len(timed) / sum(timed)
    count, size = windows.shape
    return Evaluation(count, size, sums.tokens, sums.nll, speed, weight_bytes(model), peak_bytes(), compared)


class Sums:
    """Running means over predicted tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self._nll = self._other = self._kl = self._same = 0.0

    def add(self, logits: Tensor, ids: Tensor, other: Tensor | None) -> None:
        targets = ids[:, 1:].reshape(-1, 1)
        self.tokens += targets.numel()
        log_q = _log_probabilities(logits)
        self._nll -= float(log_q.gather(1, targets).sum(dtype=torch.float64))
        if other is not None:
            log_p = _log_probabilities(other)
            self._other -= float(log_p.gather(1, targets).sum(dtype=torch.float64))
            self._kl += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
            self._same += float((log_p.argmax(1) == log_q.argmax(1)).sum())

    @property
    def nll(self) -> float:
        return self._nll / self.tokens

    @property
    def other_nll(self) -> float:
        return self._other / self.tokens

    @property
    def kl(self) -> float:
        return self._kl / self.tokens

    @property
    def top1(self) -> float:
        return self._same / self.tokens


def _log_probabilities(logits: Tensor) -> Tensor:
    """[tokens that have a successor, vocabulary], float32."""
    return logits[:, :-1].float().reshape(-1, logits.shape[-1]).log_softmax(-1)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared memory counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return sum(storages.values())


def peak_bytes() -> int:
    """The largest resident size this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
