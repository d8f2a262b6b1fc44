"""A stand-in for the model in tests of the serving layers: it counts on from the last token, and fails if told to."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import checkpoints
import torch
from tokenizers import decoders
from torch import Tensor


def tokenizer() -> Any:
    """One token per character, and text without spaces between them."""
    made = checkpoints.tokenizer()
    made.backend_tokenizer.decoder = decoders.Fuse()
    return made


VOCABULARY = 43  # of tests/checkpoints.py's tokenizer


class CountingEngine:
    """The next token is the last one plus one, kept among the letters (3…28); slots are recorded."""

    def __init__(self, slots: int = 2) -> None:
        self.slots, self.steps = slots, 0
        self.gate = threading.Event()  # cleared: decode waits
        self.gate.set()
        self.fail_prefill = self.fail_decode = False

    def warm_up(self, told: Callable[[int, int, str], None]) -> None:
        told(1, 1, "ready")

    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        if self.fail_prefill:
            raise RuntimeError("secret prompt")
        return self._next(tokens[-1])

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        assert self.gate.wait(30)
        if self.fail_decode:
            raise RuntimeError("secret prompt")
        self.steps += 1
        return torch.stack([self._next(token) for token in tokens])

    def _next(self, token: int) -> Tensor:
        logits = torch.zeros(VOCABULARY)
        logits[3 + (token - 2) % 26] = 9.0
        return logits
