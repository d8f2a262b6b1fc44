"""The GPU benchmark's models side by side, with processes that only speak as those do."""

import queue
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import gpu_models

CASES = ("decode", "prefill")
SPEAKER = """
import json, sys, time
def say(**words): print("noise"); print(json.dumps(words), flush=True)
for case in ("decode", "prefill"):
    {before}
    say(ready=case, seconds=1.5)
    while (word := sys.stdin.readline().strip()) == "time":
        time.sleep({lasting})
        say(times={{"models": [{times}], "waited": [9.0]}})
    if word != "next": break
"""


def speaker(before: str = "pass", times: str = "3.0, 1.0, 2.0", lasting: float = 0.0) -> list[str]:
    return [sys.executable, "-c", SPEAKER.format(before=before, times=times, lasting=lasting)]


def raced(commands: dict[str, list[str]], seconds: float = 60.0) -> dict[tuple[str, str, str], Any]:
    race = gpu_models.Race((name, CASES, command) for name, command in commands.items())
    rows = race.run(CASES, 8, time.monotonic() + seconds)
    assert all(variant._process.returncode is not None for variant in race.variants), "nothing is left running"
    assert {row["tokens"] for row in rows} == {8}
    return {(row["stage"], row["name"], row["variant"]): row["value"] or row["error"] for row in rows}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_models, "SETTLING", 0.0)
    monkeypatch.setattr(gpu_models, "LONGEST_ROUND", 5.0)


def test_every_case_of_every_variant_is_timed_in_turns() -> None:
    found = raced({"a": speaker(), "b": speaker(times="5.0")})
    assert found == {
        **{("models", case, name): value for case in CASES for name, value in (("a", 2.0), ("b", 5.0))},
        **{("waited", case, name): 9.0 for case in CASES for name in "ab"},
        **{("compile", case, name): 1.5 for case in CASES for name in "ab"},
    }  # fmt: skip


def test_one_that_fails_a_case_has_the_next() -> None:
    failing = "if case == 'decode': say(failed=case, error='too few rows'); continue"
    found = raced({"a": speaker(), "b": speaker(failing)})
    assert found["models", "decode", "b"] == "too few rows"
    assert found["models", "prefill", "b"] == 2.0
    assert ("compile", "decode", "b") not in found
    assert found["models", "decode", "a"] == 2.0


def test_one_that_crashes_holds_up_no_other() -> None:
    started = time.monotonic()
    found = raced({"a": speaker(), "b": speaker("if case == 'prefill': sys.exit(3)"), "c": speaker("sys.exit(1)")})
    assert found["models", "decode", "b"] == 2.0
    assert found["models", "prefill", "b"] == "its process ended"
    assert found["models", "decode", "c"] == found["models", "prefill", "c"] == "its process ended"
    assert found["models", "prefill", "a"] == 2.0
    assert time.monotonic() - started < 30


def test_one_that_is_not_ready_in_time_stands_still_while_others_are_timed() -> None:
    """And is not waited for; a case that it has ready too late is over, and the next one is timed."""
    slow = "if case == 'decode': time.sleep(3)"
    found = raced({"a": speaker(), "slow": speaker(slow)}, 5.0)
    assert found["models", "decode", "a"] == 2.0
    assert found["models", "decode", "slow"] == "out of time, still compiling"
    assert found["models", "prefill", "slow"] == 2.0


def test_others_are_stopped_and_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    race = gpu_models.Race([("a", CASES, speaker()), ("hangs", CASES, speaker("time.sleep(60)"))])
    signals: list[int] = []
    monkeypatch.setattr(race.variants[1], "signal", signals.append)
    race._hear("decode", time.monotonic() + 2)
    race._time(race.variants[:1])
    assert signals == [gpu_models.signal.SIGSTOP, gpu_models.signal.SIGCONT]
    assert len(race.variants[0].times) == gpu_models.ROUNDS
    monkeypatch.undo()
    for variant in race.variants:
        variant.end()


def test_a_round_that_hangs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_models, "LONGEST_ROUND", 0.5)
    found = raced({"a": speaker(lasting=60), "b": speaker()}, 20.0)
    assert found["models", "decode", "a"] == found["models", "prefill", "a"] == "its process ended"
    assert found["models", "decode", "b"] == found["models", "prefill", "b"] == 2.0


def test_one_that_dies_while_it_is_timed_is_not_waited_for() -> None:
    started = time.monotonic()
    dying = """import sys
print('{"ready": "decode", "seconds": 1.0}', flush=True)
sys.stdin.readline(); print('{"times": {"models": [1.0], "waited": [1.0]}}', flush=True); sys.stdin.readline()"""
    found = raced({"a": speaker(), "b": [sys.executable, "-c", dying]}, 60.0)
    assert found["models", "prefill", "a"] == 2.0
    assert found["models", "prefill", "b"] == "its process ended"
    assert time.monotonic() - started < 30


def test_one_that_is_ready_a_moment_too_late_has_the_next_case() -> None:
    """Ready when others are about to be timed: it is not one of them."""
    race = gpu_models.Race([("a", CASES, speaker()), ("b", CASES, speaker())])
    heard = race._hear

    def late(case: str, until: float) -> None:
        heard(case, until)
        if case == "decode":  # as if it had become ready just now
            race.variants[1].case = ""
            race._said.put((race.variants[1], {"ready": "decode", "seconds": 1.0}))

    race._hear = late  # type: ignore[method-assign]
    rows = race.run(CASES, 8, time.monotonic() + 30)
    found = {(row["name"], row["variant"]): row["value"] for row in rows if row["stage"] == "models"}
    assert found["prefill", "b"] == 2.0


def test_words_of_other_kinds_are_nothing() -> None:
    said: queue.Queue[Any] = queue.Queue()
    command = [sys.executable, "-c", "print('[1]'); print('{'); print('{\"ready\": 1}')"]
    variant = gpu_models.Variant("a", CASES, command, said)
    assert said.get(timeout=20)[1] == {"ready": 1}
    assert said.get(timeout=20)[1] is None
    variant.end()


def test_a_process_may_have_one_case_only() -> None:
    """Those of one variant compile side by side; each is waited for in its case and no other."""
    started = time.monotonic()
    shares = [("a", CASES, speaker())]
    shares += [("b", [case], speaker(f"if case != {case!r}: continue", times=time_)) for case, time_ in
               zip(CASES, ("3.0", "4.0"), strict=True)]  # fmt: skip
    rows = gpu_models.Race(shares).run(CASES, 8, time.monotonic() + 60)
    found = {(row["name"], row["variant"]): row["value"] for row in rows if row["stage"] == "models"}
    assert found == {("decode", "a"): 2.0, ("prefill", "a"): 2.0, ("decode", "b"): 3.0, ("prefill", "b"): 4.0}
    assert len([row for row in rows if row["stage"] == "models"]) == 4
    assert time.monotonic() - started < 30


def test_nobody_waits_for_a_process_that_has_other_cases() -> None:
    started = time.monotonic()
    race = gpu_models.Race([("a", CASES, speaker()), ("b", CASES[1:], speaker("time.sleep(60)"))])
    race._hear("decode", started + 50)
    assert [variant.state for variant in race.variants] == ["ready", "busy"]
    assert time.monotonic() - started < 30
    for variant in race.variants:
        variant.end()


def test_slow_variants_have_a_process_for_each_case_where_there_is_memory() -> None:
    def shares(layers: int, memory: float) -> list[tuple[str, int]]:
        found = list(gpu_models.processes(gpu_models.MODELS, layers, memory))
        for variant, cases, command in found:
            assert command[3] == variant
            assert command[command.index("--cases") + 1 :] == list(cases)
            assert command[command.index("--layers") + 1] == str(layers)
        return [(variant, len(cases)) for variant, cases, _ in found]

    whole = [(variant, 3) for variant in gpu_models.MODELS]
    apart = whole[:3] + [(variant, 1) for variant in gpu_models.MODELS[3:] for _ in range(3)]
    assert shares(16, 151e9) == shares(32, 151e9) == apart
    assert shares(16, 85e9) == shares(32, 130e9) == whole
