"""Where the time of a call goes: before the GPU begins, in each kernel, and between them.

    python scripts/gpu_profile.py "w8a8 int8" --layers 16 --case "decode, batch 1"

The model and its variants are those of `make gpu`.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_models import AT_ONCE, CASES, MODELS, WAITED

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
PROFILED = 5  # calls, each waited for; the last is looked at
Event = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Profile:
    """One call, in microseconds. idle: of the GPU, from the end of the call before to the first kernel. launch: of the
    graph, by the CPU. span: first kernel to last. kernels: (name, how many, together), the longest first."""

    idle: float
    launch: float
    span: float
    kernels: tuple[tuple[str, int, float], ...]

    @property
    def busy(self) -> float:
        return sum(together for _, _, together in self.kernels)

    @property
    def count(self) -> int:
        return sum(count for _, count, _ in self.kernels)

    def __str__(self) -> str:
        lines = [
            f"before the GPU begins {self.idle:9.1f} µs, of which the graph's launch {self.launch:.1f}",
            f"first to last kernel  {self.span:9.1f} µs, {self.count} kernels",
            f"between kernels       {self.span - self.busy:9.1f} µs",
        ]
        lines += [f"{together:9.1f} µs  {count:5d} × {name[:90]}" for name, count, together in self.kernels]
        return "\n".join(lines)


def profile_of(events: Sequence[Event], calls: int = PROFILED) -> Profile:
    """The last of so many calls in a trace of torch.profiler (Chrome's format), each of which was waited for.

    Raises ValueError if the trace has fewer kernels than calls.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    kernels = sorted((event for event in spans if event.get("cat") in ON_GPU), key=lambda event: event["ts"])
    if len(kernels) < calls:
        raise ValueError(f"a trace of {calls} calls must have kernels of each; this one has {len(kernels)}")
    gaps = [after["ts"] - _end(before) for before, after in itertools.pairwise(kernels)]
    longest = sorted(range(len(gaps)), key=lambda at: gaps[at])[len(gaps) - (calls - 1) :]
    begin = max(longest) + 1 if longest else 0
    last = kernels[begin:]
    launches = [event["dur"] for event in spans if "GraphLaunch" in event["name"]]
    together: dict[str, list[float]] = {}
    for event in last:
        together.setdefault(event["name"], []).append(event["dur"])
    return Profile(
        idle=gaps[begin - 1] if begin else 0.0,
        launch=launches[-1] if launches else 0.0,
        span=max(map(_end, last)) - last[0]["ts"],
        kernels=tuple(sorted(((name, len(times), sum(times)) for name, times in together.items()),
                             key=lambda found: -found[2])),
    )  # fmt: skip


def _end(event: Event) -> float:
    return float(event["ts"] + event["dur"])


def trace(call: Callable[[], object]) -> list[Event]:
    """What happens in some calls, each waited for."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(PROFILED):
            call()
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events: list[Event] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


def until_returned(call: Callable[[], object], calls: int = 20) -> float:
    """Microseconds of the CPU until a call returns, with the GPU idle."""
    import torch

    found = []
    for _ in range(calls):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return statistics.median(found) * 1e6


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("variant", choices=MODELS)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--case", choices=tuple(CASES), default=next(iter(CASES)))
    arguments = parser.parse_args(argv)
    import gpu_variant
    import torch

    if not torch.cuda.is_available():
        print("gpu_profile: an NVIDIA GPU is needed; torch finds none here", file=sys.stderr)
        return 2
    call = gpu_variant.Model(arguments.variant).prepare(arguments.case, arguments.layers)
    for _ in range(2):  # the first compiles
        times = gpu_variant.times(call)
    print(f"{arguments.variant}, {arguments.case}, {arguments.layers} layers")
    for way, name in ((AT_ONCE, "calls that follow each other"), (WAITED, "calls that are waited for")):
        print(f"{name}: {statistics.median(times[way]):.3f} ms")
    print(f"until a call returns: {until_returned(call):.1f} µs")
    print(profile_of(trace(call)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
