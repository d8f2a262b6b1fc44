"""From tokens to text as they come: whole characters only, and nothing that may turn out to be a stop string."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what decoders show for the first bytes of a character
LONGEST_CHARACTER = 8  # tokens; then it is no unfinished character but one that the model wrote

CONTEXT = 8  # tokens of the prompt that say what stands before


class IncrementalText:
    """The text that follows a prompt. `stopped` once a stop string came; what follows it is dropped, itself included.

    before: the prompt's tokens, which are no part of the text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._tokens: list[int] = list(before[-CONTEXT:])
        # Tokens before _read are in the text already; those from _prefix on are decoded again with every new one,
        # since decoders add or drop spaces by what stands before.
        self._prefix, self._read = 0, len(self._tokens)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that a token adds for sure; often empty."""
        self._tokens.append(token)
        new = self._decode(self._prefix, None)
        if new.endswith(UNFINISHED) and len(self._tokens) - self._read < LONGEST_CHARACTER:
            return ""
        added = new[len(self._decode(self._prefix, self._read)) :]
        self._prefix, self._read = self._read, len(self._tokens)
        return self._release(added)

    def finish(self) -> str:
        """What was held back, now that no token follows."""
        if self.stopped:
            return ""
        rest = self._decode(self._prefix, None)[len(self._decode(self._prefix, self._read)) :]
        self._read = self._prefix = len(self._tokens)
        text = self._release(rest)
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _decode(self, start: int, end: int | None) -> str:
        return str(self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True))

    def _release(self, added: str) -> str:
        text = self._held + added
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` starts with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
