"""The page of the GPU benchmark: figures beside goals, what is missing, who computed."""

import sys
from pathlib import Path
from typing import Any

from qcompile.bench import tuning
from qcompile.lowering.tiles import Tile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import gpu_models
import gpu_page
import gpu_rows

MACHINE = {"device": "NVIDIA H200", "torch": "2.11.0", "commit": "abc", "date": "2026-01-01"}


def report(fast: float = 1.0) -> dict[str, Any]:
    times = {"triton int8": 10 * fast, "triton fp8": 10 * fast, "_scaled_mm fp8": 11.0, "_int_mm + scales": 14.0,
             "bf16 matmul": 20.0}  # fmt: skip
    norms = {"norm bf16": 5.0, "norm + quantize int8": 5.2, "norm + quantize fp8": 9.0}
    models = {"inductor bf16": 20.0, "w8a8 int8": 10.0 * fast, "w8a8 fp8": 10.0 * fast}
    rows = [gpu_rows.row("products", name, m, variant, lambda t=t: t)
            for name in gpu_rows.SHAPES for m in gpu_rows.TOKENS for variant, t in times.items()]  # fmt: skip
    rows += [gpu_rows.row("norms", "8B", m, variant, lambda t=t: t) for m in (1, 2048) for variant, t in norms.items()]
    rows += [gpu_rows.row(way, case, 32, v, lambda t=t + more: t)
             for way, more in (("models", 0.0), ("waited", 1.0))
             for case in gpu_models.CASES for v, t in models.items()]  # fmt: skip
    rows += [gpu_rows.row("compile", "prefill 2048", 32, v, lambda: 41.4) for v in models]
    rows.append(gpu_rows.unmeasured("unfinished", "torchao int8", "torchao int8", "its process ended with status 1"))
    checks = {"tests": {"failed": False, "summary": "9 passed"}}
    return {"machine": MACHINE, "parts": {}, "checks": checks, "rows": rows}


def test_the_page_holds_every_figure_against_its_goal() -> None:
    good, bad = gpu_page.page(report()), gpu_page.page(report(fast=2.0))
    assert "| 8B qkv | 1 | 10.0 | 10.0 | 20.0 | 1.10× | 1.40× | 2.00× | 2.00× |" in good
    assert "| 8B qkv | 1 | 20.0 | 20.0 | 20.0 | **0.55×** | **0.70×** | **1.00×** | **1.00×** |" in bad
    assert "| 8B qkv | 128 | 20.0 | 20.0 | 20.0 | **0.55×** | **0.70×** | 1.00× | 1.00× |" in bad, "no goal"
    assert "| 8B | 2048 | 5.0 | 5.2 | 9.0 | 2.0% | **40.0%** |" in good
    assert "| decode, batch 1 | 20.00 | 10.00 | 10.00 | – | – | 2.00× | 2.00× | – | – |" in good
    assert "| decode, batch 1 | 21.00 | 11.00 | 11.00 | – | – | 1.91× | 1.91× | – | – |" in good
    assert "in this order: prefill 2048: 41, 41, 41, –, –." in good
    assert "- unfinished, torchao int8: 1 rows, its process ended with status 1" in good
    assert "commit abc" in good
    assert len(good.splitlines()) <= 150, "a page of docs"


def test_who_computes_is_on_the_page() -> None:
    """cuBLAS against itself is no goal, and what our kernels take there is said too."""
    found = report()
    for row in found["rows"]:
        if (row["name"], row["variant"], row["tokens"]) == ("8B qkv", "triton fp8", 8192):
            row |= {"cublas": True, "value": 11.3}
    tile = Tile(16, 32, 64, cublas=True)
    found["rows"] += gpu_rows.tune_rows(
        [tuning.Found("fp8", 8192, 6144, 4096, tile, 10.0, 12.0, 11.0)], lambda all_found: None, lambda: False
    )
    page = gpu_page.page(found)
    assert "| 8B qkv | 8192 | 10.0 | 11.3 | 20.0 | same | 1.40× | 2.00× | 1.77× |" in page
    assert "| 8B o | 8192 | 10.0 | 10.0 | 20.0 | 1.10× | 1.40× | 2.00× | 2.00× |" in page
    assert "| 8B qkv | fp8 | 1.20× (1.09×) |" in page


def test_failures_are_on_the_page() -> None:
    broken = report()
    broken["checks"] = {"tests": {"failed": True, "summary": "1 failed", "failures": ["FAILED tests/gpu/a.py::b"]}}
    page = gpu_page.page(broken)
    assert "- tests: FAILED, 1 failed" in page
    assert "  - `FAILED tests/gpu/a.py::b`" in page
    assert gpu_page.page({"machine": MACHINE, "parts": {}, "checks": {}, "rows": []}).startswith("# NVIDIA H200")
