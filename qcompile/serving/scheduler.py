"""Who has which slot and who waits. No threads, no clocks, no model: first come, first served."""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from qcompile.errors import QCompileError

Job = TypeVar("Job")


class QueueFullError(QCompileError):
    """More would wait than may."""


class Scheduler(Generic[Job]):
    """`slots` jobs run, at most `waiting` more wait in the order they came."""

    def __init__(self, slots: int, waiting: int) -> None:
        self._running: list[Job | None] = [None] * slots
        self._waiting: collections.deque[Job] = collections.deque()
        self._most_waiting = waiting

    @property
    def capacity(self) -> int:
        """How many jobs there can be at once."""
        return len(self._running) + self._most_waiting

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return sum(job is not None for job in self._running)

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(job is not None for job in self._running)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of them, or none: raises QueueFullError."""
        if self.running + self.waiting + len(jobs) > self.capacity:
            raise QueueFullError(f"at most {self._most_waiting} sequences may wait; {self.waiting} do; try again later")
        self._waiting.extend(jobs)

    def admit(self, most: int) -> list[tuple[int, Job]]:
        """Give free slots to the longest waiting, to at most so many."""
        admitted: list[tuple[int, Job]] = []
        for slot, job in enumerate(self._running):
            if job is None and self._waiting and len(admitted) < most:
                taken = self._running[slot] = self._waiting.popleft()
                admitted.append((slot, taken))
        return admitted

    def release(self, slot: int) -> None:
        """The slot is free again."""
        self._running[slot] = None

    def active(self) -> Iterator[tuple[int, Job]]:
        """The running jobs with their slots; slots may be released meanwhile."""
        return ((slot, job) for slot, job in enumerate(tuple(self._running)) if job is not None)

    def sweep(self, gone: Callable[[Job], bool]) -> list[Job]:
        """Remove, and return, the jobs that are gone, wherever they are."""
        removed = [job for job in self._waiting if gone(job)]
        self._waiting = collections.deque(job for job in self._waiting if job not in removed)
        for slot, job in self.active():
            if gone(job):
                removed.append(job)
                self.release(slot)
        return removed
