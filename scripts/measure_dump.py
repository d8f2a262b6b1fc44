"""What QCOMPILE_DEBUG=dump adds to compiling the demo model, and what observers cost that are off.

    python scripts/measure_dump.py [--inner eager inductor] [--rounds 7]

Variants take turns, in one process: "bare" has the verifier alone, without a look at QCOMPILE_DEBUG; "off" is what a
user has; "dump" writes the dumps. A figure is the median of the seconds that a first call takes. "inductor" is
measured with its caches off; "eager" compiles least, so that dumps weigh most. First calls vary by more than dumps
cost, so the seconds inside the observers are taken too.
"""

import argparse
import itertools
import os
import platform
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import qcompile
from qcompile import debug, demonstration, passes
from qcompile.config import Config
from qcompile.dump import DumpTo
from qcompile.quality.likelihood import token_windows
from qcompile.stdlib_text import stdlib_text
from qcompile.verify import Verify

WINDOW = 64


class TimedDump(DumpTo):
    """Dumps, and adds up the seconds that takes."""

    seconds: list[float] = []  # noqa: RUF012 — of all rounds, on purpose

    def start(self, *args: Any) -> None:
        began = time.perf_counter()
        super().start(*args)
        self.seconds.append(time.perf_counter() - began)

    def step(self, *args: Any) -> None:
        began = time.perf_counter()
        super().step(*args)
        self.seconds[-1] += time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--inner", nargs="+", default=["eager", "inductor"], choices=("eager", "inductor"))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(_machine(), flush=True)
    model, tokenizer = demonstration.load()
    ids = token_windows(tokenizer, stdlib_text("held_out"), WINDOW, limit=1)
    calibration = qcompile.calibrate(model, [ids])
    for inner in arguments.inner:
        rounds = arguments.rounds if inner == "eager" else max(1, arguments.rounds // 2)
        seconds = _race(lambda inner=inner: _first_call(model, ids, calibration, inner), rounds)  # type: ignore[misc]
        _print(inner, seconds)
        inside = statistics.median(TimedDump.seconds)
        share = inside / statistics.median(seconds["off"])
        print(f"{inner}, inside the dumps: {inside * 1e3:.0f} ms, {share:.1%} of a first call", flush=True)
        TimedDump.seconds.clear()
    print(f"off, all that observers add: {_off_seconds() * 1e6:.0f} us per graph", flush=True)


def _off_seconds() -> float:
    """Seconds of looking at QCOMPILE_DEBUG and listing observers, once per graph."""
    config, repeats = Config(), 1000
    pipeline = passes.quantizing(config)
    began = time.perf_counter()
    for _ in range(repeats):
        debug.observers(debug.with_environment(config), pipeline)
    return (time.perf_counter() - began) / repeats


def _race(run: Callable[[], float], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of each variant, in turns; a first round of each warms up."""
    variants = {"bare": _bare, "off": _off, "dump": _dump}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn, name in itertools.product(range(rounds + 1), variants):
        with variants[name]():
            taken = run()
        if turn:
            seconds[name].append(taken)
    return seconds


def _first_call(model: Any, ids: torch.Tensor, calibration: Any, inner: str) -> float:
    torch._dynamo.reset()
    options = {"inner": inner, "calibration": calibration}
    forward = torch.compile(model, backend="w8a8", options=options, dynamic=False)
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        started = time.perf_counter()
        forward(input_ids=ids, use_cache=False)
        return time.perf_counter() - started


@contextmanager
def _bare() -> Iterator[None]:
    kept = debug.observers, debug.with_environment
    debug.observers, debug.with_environment = (lambda config, pipeline: [Verify(full=False)]), (lambda config: config)
    try:
        yield
    finally:
        debug.observers, debug.with_environment = kept


@contextmanager
def _off() -> Iterator[None]:
    os.environ.pop(debug.VARIABLE, None)
    yield


@contextmanager
def _dump() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        place = os.getcwd()
        os.chdir(folder)
        os.environ[debug.VARIABLE] = "dump"
        kept, debug.DumpTo = debug.DumpTo, TimedDump
        try:
            yield
            if not list(Path(folder).rglob("*.diff")):
                raise SystemExit("nothing was dumped")
        finally:
            debug.DumpTo = kept
            os.environ.pop(debug.VARIABLE)
            os.chdir(place)


def _print(inner: str, seconds: dict[str, list[float]]) -> None:
    base = statistics.median(seconds["off"])
    for name, times in seconds.items():
        median = statistics.median(times)
        spread = f"{min(times):.3f}-{max(times):.3f}"
        print(f"{inner}, {name}: {median:.3f} s ({spread}), {median / base - 1:+.1%} against off", flush=True)


def _machine() -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}, qcompile {commit or 'unknown'}"


if __name__ == "__main__":
    main()
