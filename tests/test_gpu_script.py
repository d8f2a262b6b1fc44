"""scripts/gpu.py and its stages, without a GPU: rows that fail are recorded, processes that die or hang too."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu, stages = script("gpu"), script("gpu_rows")
MACHINE = {"device": "NVIDIA H200", "torch": "2.11.0", "commit": "abc", "date": "2026-01-01"}


def test_every_row_is_measured_or_says_why_not() -> None:
    def measure(variant: str, m: int, n: int, k: int) -> float:
        if variant == "triton fp8" and m == 128:
            raise RuntimeError("out of\nshared memory")
        return float(m)

    rows = list(stages.product_rows(measure))
    both = 4 * len(stages.TMA_TOKENS) * len(stages.BY_TMA)
    assert len(rows) == len(stages.SHAPES) * len(stages.TOKENS) * len(stages.PRODUCTS) + both
    failed = [row for row in rows if row["value"] is None]
    assert len(failed) == len(stages.SHAPES)
    assert {row["error"] for row in failed} == {"RuntimeError: out of"}
    assert json.loads(json.dumps(rows)) == rows
    assert len(list(stages.norm_rows(lambda variant, m, k: 1.0))) == 2 * 5 * len(stages.NORMS)
    assert [row["name"] for row in stages.model_rows("w8a8 int8", 2, lambda case, layers: 1.0)] == list(stages.CASES)


def report(fast: float = 1.0) -> dict[str, Any]:
    times = {"triton int8": 10 * fast, "triton fp8": 10 * fast, "_scaled_mm fp8": 11.0, "_int_mm + scales": 14.0,
             "bf16 matmul": 20.0, "triton int8 tma": 8.0}  # fmt: skip
    norms = {"norm bf16": 5.0, "norm + quantize int8": 5.2, "norm + quantize fp8": 9.0}
    models = {"inductor bf16": 20.0, "w8a8 int8": 10.0 * fast, "w8a8 fp8": 10.0 * fast}
    rows = [stages.row("products", name, m, variant, lambda t=t: t)
            for name in stages.SHAPES for m in stages.TOKENS for variant, t in times.items()]  # fmt: skip
    rows += [stages.row("norms", "8B", m, variant, lambda t=t: t) for m in (1, 2048) for variant, t in norms.items()]
    rows += [stages.row("models", case, 32, v, lambda t=t: t) for case in stages.CASES for v, t in models.items()]
    rows.append(gpu._unfinished("torchao int8", "its process ended with status 1"))
    checks = {"tests": {"failed": False, "summary": "9 passed"}}
    return {"machine": MACHINE, "layers": 32, "checks": checks, "rows": rows}


def test_the_page_holds_every_figure_against_its_goal(tmp_path: Path) -> None:
    good, bad = gpu.page(report()), gpu.page(report(fast=2.0))
    assert "| 8B qkv | 1 | 10.0 | 10.0 | 20.0 | 1.10× | 1.40× | 2.00× | 2.00× | 1.25× | – |" in good
    assert "| 8B qkv | 1 | 20.0 | 20.0 | 20.0 | **0.55×** | **0.70×** | **1.00×** | **1.00×** | 2.50× | – |" in bad
    assert "| 8B qkv | 128 | 20.0 | 20.0 | 20.0 | **0.55×** | **0.70×** | 1.00× | 1.00× | 2.50× |" in bad, "no goal"
    assert "| 8B | 2048 | 5.0 | 5.2 | 9.0 | 2.0% | **40.0%** |" in good
    assert "| decode, batch 1 | 20.00 | 10.00 | 10.00 | – | – | 2.00× | 2.00× | – | – |" in good
    assert "- unfinished, torchao int8: 1 rows, its process ended with status 1" in good
    assert "commit abc" in good
    gpu.write(report(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nvidia-h200.json", "nvidia-h200.md"]
    assert json.loads((tmp_path / "nvidia-h200.json").read_text()) == report()
    assert len(good.splitlines()) <= 150, "a page of docs"


def test_failures_are_on_the_page() -> None:
    broken = report()
    broken["checks"] = {"tests": {"failed": True, "summary": "1 failed", "failures": ["FAILED tests/gpu/a.py::b"]}}
    page = gpu.page(broken)
    assert "- tests: FAILED, 1 failed" in page
    assert "  - `FAILED tests/gpu/a.py::b`" in page
    assert gpu.page({"machine": MACHINE, "layers": 1, "checks": {}, "rows": []}).startswith("# NVIDIA H200")


def python(source: str) -> list[str]:
    return [sys.executable, "-c", source]


def test_rows_of_a_process_that_dies_are_kept() -> None:
    line = json.dumps(stages.row("products", "x", 1, "triton int8", lambda: 1.0))
    source = f"print({line!r}, flush=True); print('noise'); import os; os._exit(3)"
    rows = gpu.collect(python(source), "products", time.monotonic() + 60)
    assert [row["value"] for row in rows] == [1.0, None]
    assert rows[1]["error"] == "its process ended with status 3"


def test_rows_of_a_process_that_hangs_are_kept() -> None:
    line = json.dumps(stages.row("products", "x", 1, "triton int8", lambda: 1.0))
    source = f"print({line!r}, flush=True); import time; time.sleep(600)"
    started = time.monotonic()
    rows = gpu.collect(python(source), "products", started + 3)
    assert time.monotonic() - started < 30
    assert [row["error"] for row in rows] == ["", "out of time"]
    assert gpu.collect(python(source), "norms", started)[0]["error"] == "out of time before it began"


def test_a_stage_that_hangs_does_not_hold_up_the_rest() -> None:
    code, printed = gpu._run(python("import time; print('begun', flush=True); time.sleep(600)"), time.monotonic() + 3)
    assert code == 124
    assert "begun" in printed


def test_missing_tools_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.run_sanitizer(time.monotonic() + 5)["summary"] == "not run: compute-sanitizer is not installed"
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.run_tests(time.monotonic() + 5) == {"failed": True, "summary": "not run: pytest is not installed"}
    assert gpu.main([]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-P", ROOT / "scripts" / "gpu.py"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "gpu: an NVIDIA GPU is needed; torch finds none here\n"


def test_gpu_tests_are_collected_and_skipped_without_a_gpu() -> None:
    """What `make gpu` runs, here: nothing fails to import."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout if torch.cuda.is_available() else "skipped" in done.stdout
