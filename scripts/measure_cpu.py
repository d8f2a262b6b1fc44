"""A roofline of this machine's CPU: each linear of two Llama shapes against its measured peaks, in Markdown.

Peaks: bytes per second that a sum over a large tensor reads, and operations per second of oneDNN's u8·s8 product at its
best size. For every product M×K×N: our kernel with scales, residual and rounding to bf16, oneDNN's bare u8·s8 product
(int32 sums, nothing else), and its bf16 product. Weights are rotated through memory that no cache holds. All in turns,
the peaks too, since what a machine's neighbours leave of its memory changes from minute to minute; medians.

    python scripts/measure_cpu.py [--json FILE]

FILE gets the roofline beside what it holds, as `qcompile bench --json` wrote it; `qcompile report --bench` draws it.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.bench.bench import SHAPES, machine
from qcompile.lowering import scaled_mm_vnni, unsigned
from qcompile.lowering.target import detect

MODELS = ("llama-100m", "llama-400m")
TOKENS = (1, 8, 16, 32, 128, 512)
ROTATED = 96 * 2**20  # bytes of weights that a round goes through, several times the last cache
ROUNDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="add the figures to this file")
    arguments = parser.parse_args()
    points: list[dict[str, Any]] = []
    if reason := scaled_mm_vnni.runs_on(detect(torch.device("cpu"))):
        sys.exit(f"measure_cpu: our kernel {reason}")
    print(", ".join(f"{key} {value}" for key, value in machine().items()), end="\n\n")
    peak_calls = Peaks()
    bandwidths, peaks = [], []
    print("| K × N | M | w8a8 µs | GB/s | of reads | GOPS | of u8·s8 | oneDNN u8·s8, bare | bf16 |")
    print("|---" * 9 + "|")
    for k, n in linears():
        for tokens in TOKENS:
            (ours, bare, half), bandwidth, peak = times(tokens, k, n, peak_calls)
            bandwidths.append(bandwidth)
            peaks.append(peak)
            rate, work = n * k / ours, 2 * tokens * n * k / ours
            cells = (
                f"{k} × {n}", tokens, f"{ours * 1e6:.0f}", f"{rate / 1e9:.1f}", f"{rate / bandwidth:.0%}",
                f"{work / 1e9:.0f}", f"{work / peak:.0%}", f"{bare / ours:.2f}×", f"{half / ours:.2f}×",
            )  # fmt: skip
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            points.append({
                "name": f"{k} × {n}, M = {tokens}", "operations_per_second": work,
                "intensity": 2 * tokens * n * k / (n * k + tokens * k + 2 * tokens * n),
            })  # fmt: skip
    bandwidth, peak = statistics.median(bandwidths), statistics.median(peaks)
    print(f"\npeaks: reads {_range(bandwidths)} GB/s; u8·s8 {_range(peaks)} GOPS")
    if arguments.json:
        roofline = {"bytes_per_second": bandwidth, "operations_per_second": peak, "points": points}
        path = Path(arguments.json)
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**known, "roofline": roofline}, indent=2) + "\n", encoding="utf-8")


def linears(models: Sequence[str] = MODELS) -> list[tuple[int, int]]:
    """K and N of q/k/v together, o, gate and up together, and down."""
    found = []
    for hidden, intermediate, _, heads, kv_heads, _ in (SHAPES[model] for model in models):
        attention = hidden + 2 * hidden // heads * kv_heads
        found += [(hidden, attention), (hidden, hidden), (hidden, 2 * intermediate), (intermediate, hidden)]
    return found


def _range(values: list[float]) -> str:
    return f"{statistics.median(values) / 1e9:.4g} ({min(values) / 1e9:.4g}–{max(values) / 1e9:.4g})"


class Peaks:
    """What the machine can do, as calls to be timed in turn with others."""

    def __init__(self) -> None:
        data = torch.ones(ROTATED // 2, dtype=torch.int64)  # zeros take no memory until they are written
        x, weight = torch.ones(512, 4096, dtype=torch.uint8), torch.ones(4096, 4096, dtype=torch.int8)
        flat, wide = torch.ones(128, 1024, dtype=torch.uint8), torch.ones(5632, 1024, dtype=torch.int8)
        self.calls = [
            data.sum, lambda: torch._int_mm(x, weight.t()), lambda: torch._int_mm(flat, wide.t()),
        ]  # fmt: skip
        self._bytes = data.nbytes

    def of(self, read: float, square: float, flat: float) -> tuple[float, float]:
        """Bytes and int8 operations per second, from the calls' seconds."""
        return self._bytes / read, max(2 * 512 * 4096**2 / square, 2 * 128 * 5632 * 1024 / flat)


def times(tokens: int, k: int, n: int, peaks: Peaks) -> tuple[list[float], float, float]:
    """Seconds per product: ours, oneDNN's bare u8·s8, and bf16. Bytes and int8 operations per second at best."""
    weights = [torch.randint(-127, 128, (n, k), dtype=torch.int8) for _ in range(max(1, ROTATED // (n * k)))]
    halves = [torch.randn(n, k).to(torch.bfloat16) for _ in range(max(1, ROTATED // (2 * n * k)))]
    x = torch.randint(-127, 128, (tokens, k), dtype=torch.int8)
    shifted, half = unsigned.shifted(x), x.to(torch.bfloat16)
    scales, weight_scales, shift = torch.rand(tokens), torch.rand(n), unsigned.compensation(weights[0])
    residual = torch.randn(tokens, n).to(torch.bfloat16)
    kernel = torch.ops.qcompile_cpu.scaled_mm.default

    def ours(weight: Tensor) -> Tensor:
        y: Tensor = kernel(shifted, weight, scales, weight_scales, shift, None, residual, torch.bfloat16)
        return y

    def over(function: Callable[[Tensor], Tensor], rotated: Sequence[Tensor]) -> Callable[[], None]:
        def call() -> None:
            for weight in rotated:
                function(weight)

        return call

    calls = [over(ours, weights), over(lambda w: torch._int_mm(shifted, w.t()), weights),
             over(lambda w: half @ w.t(), halves)]  # fmt: skip
    counts = len(weights), len(weights), len(halves)
    seconds = in_turns([*calls, *peaks.calls])
    return [found / count for found, count in zip(seconds, counts, strict=False)], *peaks.of(*seconds[len(calls) :])


def in_turns(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Median seconds of each call, one after the other in every round."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, measured in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            measured.append(time.perf_counter() - started)
    return [statistics.median(measured) for measured in seconds]


if __name__ == "__main__":
    main()
