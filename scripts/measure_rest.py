"""What is not a product: a compiled Llama's calls by torch's profiler, products taken away, in Markdown.

    python scripts/measure_rest.py [SHAPE]

Milliseconds of a call under the profiler, of its matrix products, and of the rest, the profiler's own cost included;
for Inductor in bf16 and for w8a8, in turns; medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from qcompile.bench import bench

CASES = ("decode, batch 1", "decode, batch 8", "prefill 128", "prefill 512")
VARIANTS = ("inductor bf16", "w8a8 int8")
PRODUCTS = ("aten::mm", "aten::addmm", "qcompile_cpu::scaled_mm")
ROUNDS, CALLS = 15, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("shape", nargs="?", default="llama-100m", choices=bench.SHAPES)
    shape = parser.parse_args().shape
    models = [bench._build(shape, torch.bfloat16) for _ in VARIANTS]
    forwards = [bench._forward(model, variant) for model, variant in zip(models, VARIANTS, strict=True)]
    print("| case | " + " | ".join(f"{variant}: call | products | rest" for variant in VARIANTS) + " |")
    print("|---" * (1 + 3 * len(VARIANTS)) + "|")
    for case in CASES:
        arguments = [bench._arguments(model, *bench.CASES[case]) for model in models]
        calls = list(map(_caller, forwards, arguments))
        rounds = [[_profiled(call) for call in calls] for _ in range(ROUNDS)]
        cells = []
        for measured in zip(*rounds, strict=True):
            totals, products = zip(*measured, strict=True)
            rest = [total - product for total, product in measured]
            cells += [f"{statistics.median(values):.2f}" for values in (totals, products, rest)]
        print(f"| {case} | {' | '.join(cells)} |", flush=True)


def _caller(forward: Callable[..., Any], arguments: dict[str, Any]) -> Callable[[], None]:
    """A call, compiled and warm."""

    def call() -> None:
        bench._rewind(arguments)
        with torch.no_grad():
            forward(**arguments)

    for _ in range(4):
        call()
    return call


def _profiled(call: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds of a call, and of the matrix products in it."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        total = time.perf_counter() - started
    microseconds = [event.self_cpu_time_total for event in found.key_averages() if event.key in PRODUCTS]
    if not microseconds:
        raise RuntimeError(f"a call must have products; the profiler found none of {', '.join(PRODUCTS)}")
    return total / CALLS * 1e3, float(sum(microseconds)) / (CALLS + 1) / 1e3


if __name__ == "__main__":
    main()
