"""The thread that owns the model: it takes sequences from the queue, steps all of them together, and hands out events.

A sequence's settings, text and random numbers are its own. Whatever goes wrong with one ends that one; what goes wrong
with a step ends those that took part in it, and the loop goes on.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from qcompile.serving.incremental_text import IncrementalText
from qcompile.serving.sampling import Choice, Sampler
from qcompile.serving.scheduler import Scheduler

Finish = Literal["stop", "length", "timeout", "cancelled", "error"]
ADMITTED = 4  # prompts taken in between two decode steps: more would make running streams wait


class Engine(Protocol):
    """What the loop needs of qcompile.generation.slots.Slots."""

    slots: int

    def warm_up(self, told: Callable[[int, int, str], None]) -> None: ...

    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor: ...

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Event:
    """A token of a sequence (None if it ended without one), the text that is now certain, and how it ended, if so."""

    choice: Choice | None
    text: str
    finish: Finish | None = None


@dataclasses.dataclass(eq=False)
class Generation:
    """One sequence to generate. prompt and limit fit the engine's length together. deadline: of time.monotonic.

    `cancelled` may be set from any thread; all else belongs to the loop.
    """

    prompt: tuple[int, ...]
    limit: int
    ends: frozenset[int]
    sampler: Sampler
    text: IncrementalText
    deadline: float
    deliver: Callable[[Event], None]
    cancelled: bool = False
    made: int = 0
    last: int = 0


class ServingLoop:
    """Runs an engine in a thread of its own. post: called once a step with what is to be delivered, in order."""

    def __init__(
        self, engine: Engine, waiting: int, post: Callable[[list[tuple[Generation, Event]]], None] | None = None
    ) -> None:
        self.scheduler: Scheduler[Generation] = Scheduler(engine.slots, waiting)
        self.errors: list[str] = []  # of the engine: types only, a message may quote what a client sent
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        self.post = post or _deliver
        self.steps = 0
        self._engine = engine
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="qcompile-serving", daemon=True)
        self._threads = torch.get_num_threads()

    def start(self, told: Callable[[int, int, str], None] = lambda done, total, what: None) -> None:
        """Compile and start. Raises what compiling raised."""
        self._told = told
        self._thread.start()
        self.ready.wait()
        if self.failure is not None:
            raise self.failure

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue all, or none: raises QueueFullError."""
        with self._changed:
            self.scheduler.submit(generations)
            self._changed.notify()

    def close(self) -> None:
        """Finish what runs and waits, then end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # Dynamo guards on it, and every thread has its own
        try:
            self._engine.warm_up(self._told)
        except BaseException as error:
            self.failure = error
        self.ready.set()
        while self.failure is None:
            with self._changed:
                while not self.scheduler.busy and not self._closing:
                    self._changed.wait()
                if not self.scheduler.busy:
                    return
                gone = self.scheduler.sweep(lambda job: job.cancelled or job.deadline < time.monotonic())
                admitted = self.scheduler.admit(ADMITTED)
            events = [(job, Event(None, "", "cancelled" if job.cancelled else "timeout")) for job in gone]
            for slot, job in admitted:
                events += self._guarded([(slot, job)], lambda slot=slot, job=job: [self._prefill(slot, job)])  # type: ignore[misc]
            running = list(self.scheduler.active())
            if running:
                events += self._guarded(running, lambda: self._decode(running))  # noqa: B023
            self.steps += 1
            if events:
                self.post(events)

    def _guarded(
        self, jobs: Sequence[tuple[int, Generation]], step: Callable[[], Iterable[tuple[Generation, Event]]]
    ) -> list[tuple[Generation, Event]]:
        """What a step yields; if it fails, the end of its sequences."""
        try:
            return list(step())
        except Exception as error:  # anything at all: the server goes on without these sequences
            self.errors.append(type(error).__name__)
            with self._changed:
                for slot, _ in jobs:
                    self.scheduler.release(slot)
            return [(job, Event(None, "", "error")) for _, job in jobs]

    def _prefill(self, slot: int, job: Generation) -> tuple[Generation, Event]:
        return self._advance(slot, job, self._engine.prefill(slot, job.prompt).cpu())

    def _decode(self, running: Sequence[tuple[int, Generation]]) -> list[tuple[Generation, Event]]:
        tokens, positions = [0] * self._engine.slots, [0] * self._engine.slots
        for slot, job in running:
            tokens[slot], positions[slot] = job.last, len(job.prompt) + job.made - 1
        rows = self._engine.decode(tokens, positions).cpu()
        events = []
        for slot, job in running:
            events += self._guarded([(slot, job)], lambda slot=slot, job=job: [self._advance(slot, job, rows[slot])])  # type: ignore[misc]
        return events

    def _advance(self, slot: int, job: Generation, logits: Tensor) -> tuple[Generation, Event]:
        choice = job.sampler.choose(logits)
        job.made, job.last = job.made + 1, choice.token
        finish: Finish | None = None
        if choice.token in job.ends:
            text, finish = job.text.finish(), "stop"
        else:
            text = job.text.push(choice.token)
            if not job.text.stopped and job.made >= job.limit:
                text, finish = text + job.text.finish(), "length"
            if job.text.stopped:
                finish = "stop"
        if finish:
            with self._changed:
                self.scheduler.release(slot)
        return job, Event(choice, text, finish)


def _deliver(events: Iterable[tuple[Generation, Event]]) -> None:
    for job, event in events:
        job.deliver(event)
