"""The loop, with a stand-in for the model."""

import queue
import time
from collections.abc import Iterator

import pytest
from serving_engine import CountingEngine, tokenizer

from qcompile.serving.incremental_text import IncrementalText
from qcompile.serving.loop import Event, Generation, ServingLoop
from qcompile.serving.sampling import Sampler, Sampling
from qcompile.serving.scheduler import QueueFullError

TOKENIZER = tokenizer()


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def loop(engine: CountingEngine) -> Iterator[ServingLoop]:
    made = ServingLoop(engine, waiting=3)
    made.start()
    yield made
    engine.gate.set()
    made.close()


def generation(start: int = 3, limit: int = 4, *, seconds: float = 60.0, stops: tuple[str, ...] = ()) -> Generation:
    events: queue.Queue[Event] = queue.Queue()
    made = Generation(
        (start,), limit, frozenset([2]), Sampler(Sampling(temperature=0)), IncrementalText(TOKENIZER, stops),
        time.monotonic() + seconds, events.put,
    )  # fmt: skip
    made.events = events  # type: ignore[attr-defined]
    return made


def result(made: Generation) -> tuple[str, str | None]:
    text = ""
    while True:
        event = made.events.get(timeout=30)  # type: ignore[attr-defined]
        text += event.text
        if event.finish:
            return text, event.finish


def test_sequences_share_steps_and_keep_their_own(loop: ServingLoop, engine: CountingEngine) -> None:
    jobs = [generation(3, 20), generation(10, 20)]
    loop.submit(jobs)
    assert [result(job) for job in jobs] == [("bcdefghijklmnopqrstu", "length"), ("ijklmnopqrstuvwxyzab", "length")]
    assert engine.steps <= 20


def test_stop_strings_end_it(loop: ServingLoop) -> None:
    job = generation(3, 20, stops=("ef",))
    loop.submit([job])
    assert result(job) == ("bcd", "stop")


def test_a_full_queue_and_its_end(loop: ServingLoop, engine: CountingEngine) -> None:
    engine.gate.clear()
    jobs = [generation() for _ in range(5)]
    loop.submit(jobs)
    with pytest.raises(QueueFullError):
        loop.submit([generation()])
    engine.gate.set()
    assert {result(job) for job in jobs} == {("bcde", "length")}


def test_cancelled_and_late_ones_leave(loop: ServingLoop, engine: CountingEngine) -> None:
    engine.gate.clear()
    running, waiting, late = generation(limit=50), generation(), generation(seconds=0)
    loop.submit([running, generation(limit=50), waiting, late])
    waiting.cancelled = running.cancelled = True
    engine.gate.set()
    assert result(waiting)[1] == result(running)[1] == "cancelled"
    assert result(late)[1] == "timeout"


@pytest.mark.parametrize("fault", ["fail_prefill", "fail_decode"])
def test_a_failing_model_ends_its_sequences_only(loop: ServingLoop, engine: CountingEngine, fault: str) -> None:
    setattr(engine, fault, True)
    job = generation()
    loop.submit([job])
    assert result(job)[1] == "error"
    assert loop.errors == ["RuntimeError"]
    setattr(engine, fault, False)
    again = generation()
    loop.submit([again])
    assert result(again) == ("bcde", "length")
