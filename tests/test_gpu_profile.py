"""What scripts/gpu_profile.py makes of a trace."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import gpu_profile


def kernel(name: str, ts: float, dur: float, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def calls(count: int) -> list[dict[str, Any]]:
    """Each of four kernels within 20 µs, 100 µs after the one before, launched in 7 µs; the last a little slower."""
    found: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "args": {}}]
    for call in range(count):
        begin, late = call * 120.0, float(call == count - 1)
        found += [
            kernel("cudaGraphLaunch", begin - 9, 7.0 + late, "cuda_runtime"),
            kernel("product", begin + 12, 8.0 + late), kernel("Memset", begin, 1.0, "gpu_memset"),
            kernel("norm", begin + 2, 3.0), kernel("product", begin + 6, 5.0),
        ]  # fmt: skip
    return found


def test_the_last_call_is_taken_apart() -> None:
    found = gpu_profile.profile_of(calls(5), 5)
    assert found == gpu_profile.Profile(
        idle=100.0, launch=8.0, span=21.0, kernels=(("product", 2, 14.0), ("norm", 1, 3.0), ("Memset", 1, 1.0))
    )
    assert (found.busy, found.count) == (18.0, 4)
    assert str(found).splitlines() == [
        "before the GPU begins     100.0 µs, of which the graph's launch 8.0",
        "first to last kernel       21.0 µs, 4 kernels",
        "between kernels             3.0 µs",
        "     14.0 µs      2 × product",
        "      3.0 µs      1 × norm",
        "      1.0 µs      1 × Memset",
    ]


def test_one_call_has_nothing_before_it() -> None:
    found = gpu_profile.profile_of(calls(1), 1)
    assert (found.idle, found.span) == (0.0, 21.0)


def test_a_trace_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="must have kernels of each; this one has 0"):
        gpu_profile.profile_of([event for event in calls(5) if event.get("cat") == "cuda_runtime"], 5)


def test_a_real_trace_has_the_fields_that_are_read(tmp_path: Path) -> None:
    with torch.profiler.profile() as profile:
        torch.ones(3) + 1
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event.get("ph") == "X"]
    assert any(event["name"] == "aten::add" for event in spans)
    assert all({"name", "ts", "dur"} <= set(event) for event in spans)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line() -> None:
    command = [sys.executable, "-P", gpu_profile.__file__, "w8a8 int8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr == "gpu_profile: an NVIDIA GPU is needed; torch finds none here\n"
