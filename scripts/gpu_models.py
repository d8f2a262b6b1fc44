"""The models of the GPU benchmark, side by side: every variant compiles in processes of its own (`gpu_variant`), all at
once, and is timed alone, in turns with the others.

A process says on its standard output that a case is ready; on its standard input it is told to time it ("time") or to
go on ("next"). What is not ready when a case's time is up is stopped while others are timed.
"""

import contextlib
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

MODELS = ("inductor bf16", "w8a8 int8", "w8a8 fp8", "torchao int8", "torchao fp8")
# Sequences and tokens of each. The most important first: a variant whose time is up has measured those.
CASES = {"decode, batch 1": (1, 1), "prefill 2048": (1, 2048), "decode, batch 32": (32, 1)}
# Milliseconds of a call among others that follow it at once, and of one that is waited for.
AT_ONCE, WAITED = "models", "waited"
LAYER_BYTES, OTHER_BYTES = 440e6, 2.1e9  # of 8B's shape in bf16: a layer; embedding and head
PROCESS_BYTES = 2e9  # CUDA, compiled kernels, what a call needs
Row = dict[str, Any]
ROUNDS = 5  # in which every variant is timed once
LONGEST_ROUND = 20.0  # seconds that a variant may take to time itself
SETTLING = 0.3  # seconds until a GPU has nothing left of a process that was stopped


def processes(
    variants: Sequence[str], layers: int, memory: float
) -> Iterable[tuple[str, Sequence[str], Sequence[str]]]:
    """A process for each variant, or, of torchao, which compiles slowest, for each of its cases, if they all fit into
    so many bytes of a GPU."""
    script = str(Path(__file__).with_name("gpu_variant.py"))
    slow = [variant for variant in variants if variant.startswith("torchao")]
    # In bf16, in 8 bits, or, as ours are, in both.
    weights = {"inductor": 1.0, "w8a8": 1.5, "torchao": 0.5}
    needed = {variant: layers * LAYER_BYTES * weights[variant.partition(" ")[0]] + OTHER_BYTES + PROCESS_BYTES
              for variant in variants}  # fmt: skip
    fits = sum(needed[variant] * (len(CASES) if variant in slow else 1) for variant in variants) <= 0.95 * memory
    for variant in variants:
        shares = [[case] for case in CASES] if variant in slow and fits else [list(CASES)]
        for cases in shares:
            yield variant, cases, [sys.executable, "-P", script, variant, "--layers", str(layers), "--cases", *cases]


class Variant:
    """One process, the cases it has, and what it said last. `state`: "busy" (compiling), "ready", or "gone"."""

    def __init__(
        self, name: str, cases: Sequence[str], command: Sequence[str],
        said: "queue.Queue[tuple[Variant, Row | None]]",
    ) -> None:  # fmt: skip
        self.name, self.cases, self.state, self.case = name, cases, "busy", ""
        self.seconds: dict[str, float] = {}  # of compiling
        self.errors: dict[str, str] = {}
        self.times: list[dict[str, list[float]]] = []
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "3"},
        )  # fmt: skip
        self._listener = threading.Thread(target=self._listen, args=(said,), daemon=True)
        self._listener.start()

    def _listen(self, said: "queue.Queue[tuple[Variant, Row | None]]") -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    said.put((self, found))
        said.put((self, None))

    def tell(self, word: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


class Race:
    """All variants through all cases, until `end` by `clock`. processes: a variant, the cases it has, the command."""

    def __init__(
        self, processes: Iterable[tuple[str, Sequence[str], Sequence[str]]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._said: queue.Queue[tuple[Variant, Row | None]] = queue.Queue()
        self._clock = clock
        self._over: Sequence[str] = ()
        self.variants = [Variant(*process, self._said) for process in processes]

    def run(self, cases: Sequence[str], layers: int, end: float) -> list[Row]:
        """A row of milliseconds for every case and variant, and one of the seconds that it compiled."""
        rows: list[Row] = []
        try:
            for at, case in enumerate(cases):
                self._over = cases[:at]
                # The first case has two shares: everything starts in it, and slow variants compile the others beside.
                share = (2 / (len(cases) + 1) if at == 0 else 1 / (len(cases) - at)) * 0.9
                self._hear(case, self._clock() + share * (end - self._clock()))
                ready = [variant for variant in self.variants if (variant.state, variant.case) == ("ready", case)]
                self._time(ready)
                running = [variant for variant in self.variants if case in variant.cases]
                rows += [row for variant in running for row in _rows(variant, case, layers)]
                for variant in self.variants:
                    variant.times = []
                    if (variant.state, variant.case) == ("ready", case):  # one that was ready too late, too
                        variant.state = "busy"
                        variant.tell("next")
        finally:
            for variant in self.variants:
                variant.end()
        return rows

    def _hear(self, case: str, until: float) -> None:
        """Wait until every variant has the case ready, or failed, or the time is up."""
        while self._clock() < until and any(_is_awaited(variant, case) for variant in self.variants):
            with contextlib.suppress(queue.Empty):
                self._take(*self._said.get(timeout=max(0.05, min(1.0, until - self._clock()))))

    def _take(self, variant: Variant, found: Row | None) -> None:
        if found is None:
            variant.state = "gone"
        elif "ready" in found:
            variant.case, variant.state = found["ready"], "ready"
            variant.seconds[variant.case] = found["seconds"]
            if variant.case in self._over:  # too late
                variant.state = "busy"
                variant.tell("next")
        elif "failed" in found:
            variant.errors[found["failed"]] = found["error"]
        elif "times" in found:
            variant.times.append(found["times"])

    def _time(self, ready: Sequence[Variant]) -> None:
        """Rounds in which one after the other times itself, and everything else stands still."""
        others = [variant for variant in self.variants if variant not in ready and variant.state != "gone"]
        for variant in others:
            variant.signal(signal.SIGSTOP)
        time.sleep(SETTLING if ready else 0)
        for _ in range(ROUNDS):
            for variant in [variant for variant in ready if variant.state == "ready"]:
                before, until = len(variant.times), self._clock() + LONGEST_ROUND
                variant.tell("time")
                while variant.state == "ready" and len(variant.times) == before and self._clock() < until:
                    with contextlib.suppress(queue.Empty):
                        self._take(*self._said.get(timeout=0.5))
                if variant.state == "ready" and len(variant.times) == before:
                    variant.state = "gone"  # or it would run beside others, and answer when another case is asked for
                    variant.end()
        for variant in others:
            variant.signal(signal.SIGCONT)


def _is_awaited(variant: Variant, case: str) -> bool:
    return variant.state == "busy" and case in variant.cases and case not in variant.errors


def _rows(variant: Variant, case: str, layers: int) -> Iterable[Row]:
    def row(stage: str, value: float | None, error: str = "") -> Row:
        return {"stage": stage, "name": case, "tokens": layers, "variant": variant.name, "value": value, "error": error}

    if case in variant.errors:
        yield row(AT_ONCE, None, variant.errors[case])
    elif variant.times and variant.case == case:
        for way in (AT_ONCE, WAITED):
            yield row(way, statistics.median(time for times in variant.times for time in times[way]))
    else:
        yield row(AT_ONCE, None, "its process ended" if variant.state == "gone" else "out of time, still compiling")
    if case in variant.seconds:
        yield row("compile", variant.seconds[case])
