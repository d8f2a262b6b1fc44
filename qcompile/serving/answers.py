"""Bodies of answers: choices, chunks and log-probabilities, for completions and for chat.

Dicts, not the models of the `openai` package: a chunk goes out for every token. The tests read them with that package.
"""

from collections.abc import Callable, Sequence
from typing import Any

from qcompile.serving.protocol import usage
from qcompile.serving.sampling import Choice
from qcompile.serving.spelling import Spelling

LEAST = -9999.0  # the protocol's log-probability of what cannot be: JSON has no infinity


class Style:
    """How one endpoint words its answers. spell: one token by itself."""

    def __init__(
        self, *, chat: bool, ident: str, created: int, model: str, spell: Callable[[int], Spelling]
    ) -> None:
        self._chat, self._spell = chat, spell
        kind = ("chat.completion", "chat.completion.chunk") if chat else ("text_completion", "text_completion")
        base = {"id": ident, "created": created, "model": model}
        self._whole, self._chunk = ({**base, "object": word} for word in kind)

    def whole(self, choices: Sequence[dict[str, Any]], prompt: int, completion: int) -> dict[str, Any]:
        """The answer that is not streamed."""
        return {**self._whole, "choices": list(choices), "usage": usage(prompt, completion)}

    def choice(
        self, index: int, text: str, finish: str | None, tokens: Sequence[tuple[Choice, str]], *, logprobs: bool
    ) -> dict[str, Any]:
        """One choice of the whole answer. tokens: each with the text it added."""
        content: dict[str, Any] = {"text": text}
        if self._chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        reported = self._logprobs(tokens, 0) if logprobs else None
        return {"index": index, **content, "logprobs": reported, "finish_reason": finish}

    def opening(self, index: int, *, usage_follows: bool) -> dict[str, Any] | None:
        """The chunk that a chat stream starts with."""
        if not self._chat:
            return None
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._with_usage([choice], usage_follows)

    def piece(
        self, index: int, text: str, finish: str | None, tokens: Sequence[tuple[Choice, str]], offset: int,
        *, logprobs: bool, usage_follows: bool,
    ) -> dict[str, Any]:  # fmt: skip
        """A chunk with the text that a step added. offset: of it, in the whole text."""
        content: dict[str, Any] = {"text": text}
        if self._chat:
            content = {"delta": {"content": text} if text else {}}
        reported = self._logprobs(tokens, offset) if logprobs and tokens else None
        choice = {"index": index, **content, "logprobs": reported, "finish_reason": finish}
        return self._with_usage([choice], usage_follows)

    def last(self, prompt: int, completion: int) -> dict[str, Any]:
        """The chunk with the counts."""
        return {**self._chunk, "choices": [], "usage": usage(prompt, completion)}

    def _with_usage(self, choices: list[dict[str, Any]], usage_follows: bool) -> dict[str, Any]:
        chunk = {**self._chunk, "choices": choices}
        return {**chunk, "usage": None} if usage_follows else chunk

    def _logprobs(self, tokens: Sequence[tuple[Choice, str]], offset: int) -> dict[str, Any]:
        if self._chat:
            return {"content": [self._chat_token(choice) for choice, _ in tokens], "refusal": None}
        offsets = []
        for _, text in tokens:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": [self._spell(choice.token).text for choice, _ in tokens],
            "token_logprobs": [_finite(choice.logprob) for choice, _ in tokens],
            "top_logprobs": [self._best(choice) for choice, _ in tokens],
            "text_offset": offsets,
        }

    def _best(self, choice: Choice) -> dict[str, float | None]:
        """By text; where two tokens have the same, the less likely one goes by another name."""
        best: dict[str, float | None] = {}
        for token, value in choice.best:
            spelled = self._spell(token)
            names = (spelled.text, spelled.piece, f"token_id:{token}")
            best[next(name for name in names if name not in best)] = _finite(value)
        return best

    def _chat_token(self, choice: Choice) -> dict[str, Any]:
        best = [self._entry(token, value) for token, value in choice.best]
        return {**self._entry(choice.token, choice.logprob), "top_logprobs": best}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        spelled = self._spell(token)
        return {"token": spelled.text, "logprob": _finite(logprob), "bytes": list(spelled.raw)}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)
