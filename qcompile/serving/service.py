"""From a checked request to sequences in the loop, and from their events to an answer: everything but HTTP."""

import asyncio
import contextlib
import copy
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from qcompile.serving.answers import Style
from qcompile.serving.incremental_text import IncrementalText
from qcompile.serving.loop import Event, Generation, ServingLoop
from qcompile.serving.metrics import Metrics
from qcompile.serving.protocol import ApiError, ChatRequest, CompletionRequest
from qcompile.serving.sampling import Choice, Sampler, Sampling
from qcompile.serving.scheduler import QueueFullError
from qcompile.serving.spelling import Spelling, spelling

RETRY_AFTER = 1  # seconds; a slot is usually free much sooner
ENDED = {"timeout": (504, "the time limit was reached"), "error": (500, "the model failed on this request")}


class Service:
    """A model behind the protocol. length: positions of prompt and completion together. timeout: seconds."""

    def __init__(
        self, loop: ServingLoop, tokenizer: Any, *, name: str, length: int, vocabulary: int, ends: frozenset[int],
        timeout: float = 600.0,
    ) -> None:  # fmt: skip
        self.loop, self.name, self.length, self.metrics = loop, name, length, Metrics()
        self._vocabulary, self._ends, self._timeout = vocabulary, ends, timeout
        # Tokenizers are not thread-safe: one reads prompts, one writes text in the loop's thread.
        self._reader, self._writer, self._reading = tokenizer, copy.deepcopy(tokenizer), threading.Lock()

    async def start(self, request: CompletionRequest | ChatRequest) -> "Answer":
        """Queue a request. Raises ApiError: 400, 404 or 429."""
        if request.model != self.name:
            raise ApiError(404, "there is no such model here; see /v1/models", param="model", code="model_not_found")
        prompts = await asyncio.to_thread(self._prompts, request)
        limits = [self._limit(prompt, request.limit) for prompt in prompts]
        copies = request.n or 1
        count = len(prompts) * copies
        if count > self.loop.scheduler.capacity:
            raise ApiError(400, f"prompts × n must be at most {self.loop.scheduler.capacity}; got {count}", param="n")
        answer = Answer(self, request, prompts)
        answer.generations = [
            self._generation(answer, at, prompts[at // copies], limits[at // copies]) for at in range(count)
        ]
        try:
            self.loop.submit(answer.generations)
        except QueueFullError as error:
            raise ApiError(429, f"{error}", code="queue_full", retry=RETRY_AFTER) from None
        self.metrics.add("qcompile_prompt_tokens_total", sum(map(len, prompts)))
        return answer

    def _prompts(self, request: CompletionRequest | ChatRequest) -> list[list[int]]:
        with self._reading:
            if isinstance(request, ChatRequest):
                prompts = [self._chat(request)]
            else:
                prompts = [self._reader(p)["input_ids"] if isinstance(p, str) else p for p in request.prompts]
        field = "messages" if isinstance(request, ChatRequest) else "prompt"
        for prompt in prompts:
            if not prompt:
                raise ApiError(400, f"{field} must have at least one token", param=field)
            if max(prompt) >= self._vocabulary:
                raise ApiError(400, f"tokens must be below {self._vocabulary}", param=field)
        return prompts

    def _chat(self, request: ChatRequest) -> list[int]:
        if not getattr(self._reader, "chat_template", None):
            raise ApiError(400, "this model has no chat template; use /v1/completions")
        messages = [message.plain() for message in request.messages]
        try:
            text = self._reader.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception:  # templates raise what they like, quoting what was sent
            raise ApiError(400, "the model's chat template refuses these messages", param="messages") from None
        tokens: list[int] = self._reader(text, add_special_tokens=False)["input_ids"]
        return tokens

    def _limit(self, prompt: Sequence[int], wanted: int | None) -> int:
        room = self.length - len(prompt)
        if room < 1 or (wanted or 0) > room:
            asked = f" and {wanted} of completion" if wanted else ""
            raise ApiError(
                400,
                f"prompt and completion have at most {self.length} tokens here; got {len(prompt)} of prompt{asked}",
                code="context_length_exceeded",
            )  # fmt: skip
        return wanted or room

    def _generation(self, answer: "Answer", at: int, prompt: Sequence[int], limit: int) -> Generation:
        request = answer.request
        sampling = Sampling(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            seed=request.seed,
            logprobs=request.best,
        )
        text = IncrementalText(self._writer, request.stops, prompt)
        return Generation(
            tuple(prompt), limit, self._ends, Sampler(sampling, at), text,
            time.monotonic() + self._timeout, lambda event: answer.events.put_nowait((at, event)),
        )  # fmt: skip

    def spell(self, token: int) -> Spelling:
        """A token by itself."""
        with self._reading:
            return spelling(self._reader, token)

    def is_end(self, token: int) -> bool:
        return token in self._ends


class Answer:
    """A request under way. Use it from the event loop only."""

    def __init__(self, service: Service, request: CompletionRequest | ChatRequest, prompts: Sequence[Sequence[int]]):
        chat = isinstance(request, ChatRequest)
        ident = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self.service, self.request, self.generations = service, request, list[Generation]()
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._style = Style(chat=chat, ident=ident, created=int(time.time()), model=service.name, spell=service.spell)
        self._prompt_tokens, self._made, self._started = sum(map(len, prompts)), 0, time.monotonic()

    def cancel(self) -> None:
        """The client is gone: give the slots to others."""
        for generation in self.generations:
            generation.cancelled = True

    async def whole(self) -> dict[str, Any]:
        """Wait for all sequences. Raises ApiError."""
        texts = [""] * len(self.generations)
        tokens: list[list[tuple[Choice, str]]] = [[] for _ in texts]
        finishes: list[str | None] = [None] * len(texts)
        async for at, event in self._events():
            texts[at] += event.text
            finishes[at] = event.finish
            tokens[at] += self._reported(event)
        logprobs = self.request.best is not None
        choices = [
            self._style.choice(at, texts[at], finishes[at], tokens[at], logprobs=logprobs) for at in range(len(texts))
        ]
        return self._style.whole(choices, self._prompt_tokens, self._made)

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events. The first comes with the first token; an ApiError before it is raised, a later one
        is an event."""
        usage, logprobs = self.request.with_usage, self.request.best is not None
        offsets, opened = [0] * len(self.generations), False
        try:
            async for at, event in self._events():
                if not opened:
                    opened = True
                    for index in range(len(self.generations)):
                        if opening := self._style.opening(index, usage_follows=usage):
                            yield _sse(opening)
                tokens = self._reported(event)
                if event.text or event.finish or (logprobs and tokens):
                    yield _sse(
                        self._style.piece(
                            at, event.text, event.finish, tokens, offsets[at], logprobs=logprobs, usage_follows=usage
                        )
                    )
                offsets[at] += len(event.text)
        except ApiError as error:
            if not opened:
                raise
            yield _sse(error.body)
            return
        if usage:
            yield _sse(self._style.last(self._prompt_tokens, self._made))
        yield b"data: [DONE]\n\n"

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        """Events until all sequences have ended. Raises ApiError when one fails; cancels the rest when left early."""
        left, metrics = len(self.generations), self.service.metrics
        seen: set[int] = set()
        try:
            while left:
                at, event = await self.events.get()
                if at not in seen:
                    seen.add(at)
                    metrics.first_token(time.monotonic() - self._started)
                if event.choice is not None:
                    self._made += 1
                    metrics.add("qcompile_generated_tokens_total")
                if event.finish:
                    left -= 1
                    metrics.add("qcompile_finished_total", how=event.finish)
                if event.finish in ENDED:
                    raise ApiError(*ENDED[event.finish])
                if event.finish == "cancelled":
                    raise ApiError(499, "the client left")
                yield at, event
        finally:
            if left:
                self.cancel()

    def _reported(self, event: Event) -> list[tuple[Choice, str]]:
        ended = event.choice is None or self.service.is_end(event.choice.token)
        return [] if ended or event.choice is None else [(event.choice, event.text)]


def _sse(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def poster(loop: asyncio.AbstractEventLoop) -> Any:
    """What hands a step's events from the model's thread to the event loop, in one call."""

    def deliver(events: list[tuple[Generation, Event]]) -> None:
        for generation, event in events:
            generation.deliver(event)

    def post(events: list[tuple[Generation, Event]]) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody listens
            loop.call_soon_threadsafe(deliver, events)

    return post
