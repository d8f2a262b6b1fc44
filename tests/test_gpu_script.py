"""scripts/gpu.py and its stages, without a GPU: rows that fail are recorded, processes that die or hang too."""

import argparse
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


gpu, gpu_rows = script("gpu"), script("gpu_rows")
gpu_models, gpu_page = gpu.gpu_models, gpu.gpu_page
MACHINE = {"device": "NVIDIA H200", "torch": "2.11.0", "commit": "abc", "date": "2026-01-01"}


def begun(folder: Path, commit: str, *stages: str, layers: int = 32, variants: Any = None) -> dict[str, Any]:
    """A run of some stages that finds nothing but one row and one check of each."""
    facts = {**MACHINE, "commit": commit}
    found = gpu.begin(folder, facts, stages)
    arguments = argparse.Namespace(layers=layers, variants=variants or gpu_models.MODELS)
    for stage in stages:
        rows = [row_of(stage, layers, variant) for variant in arguments.variants] if stage == "models" else [
            row_of(stage, 1, commit)]  # fmt: skip
        gpu.renew(found, stage, arguments, rows, {stage: {"failed": False, "summary": commit}})
        gpu.write(found, folder)
    return found


def row_of(stage: str, tokens: int, variant: str) -> dict[str, Any]:
    return gpu_rows.row(stage, "decode, batch 1", tokens, variant, lambda: 1.0)


def test_parts_that_do_not_run_stay(tmp_path: Path) -> None:
    """And their commit is said; models of another number of layers are another part, and so are other variants."""
    begun(tmp_path, "abc", *gpu.STAGES)
    found = begun(tmp_path, "def", "products", "models", variants=["w8a8 int8"])
    assert [row["variant"] for row in found["rows"] if row["stage"] == "products"] == ["def"]
    assert [row["variant"] for row in found["rows"] if row["stage"] == "norms"] == ["abc"]
    assert sorted(row["variant"] for row in found["rows"] if row["stage"] == "models") == sorted(gpu_models.MODELS)
    assert found["checks"]["norms"]["summary"] == "abc"
    assert found["checks"]["products"]["summary"] == "def"
    page = gpu_page.page(found)
    assert "- norms: measured at commit abc" in page
    assert "- models, 32 layers, w8a8 fp8: measured at commit abc" in page
    assert "- models, 32 layers, w8a8 int8: measured" not in page
    assert "- products: measured" not in page
    found = begun(tmp_path, "ghi", "models", layers=16)
    assert {row["tokens"] for row in found["rows"] if row["stage"] == "models"} == {16, 32}
    found = begun(tmp_path, "jkl", *gpu.STAGES, layers=16)
    assert {part["commit"] for part in found["parts"].values()} == {"jkl"}, "a whole run begins anew"
    assert {row["tokens"] for row in found["rows"] if row["stage"] == "models"} == {16}


def test_a_record_is_a_page_and_its_figures(tmp_path: Path) -> None:
    found = begun(tmp_path, "abc", *gpu.STAGES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nvidia-h200.json", "nvidia-h200.md"], "nothing partial"
    assert json.loads((tmp_path / "nvidia-h200.json").read_text()) == found
    assert (tmp_path / "nvidia-h200.md").read_text() == gpu_page.page(found)


def test_what_is_said_of_a_stage_goes_with_it(tmp_path: Path) -> None:
    begun(tmp_path, "abc", "products", "norms")
    found = gpu.begin(tmp_path, MACHINE, ["products"])
    gpu.renew(found, "products", argparse.Namespace(layers=1, variants=()), [], {})
    assert list(found["checks"]) == ["norms"]


def test_parts_of_other_versions_are_said(tmp_path: Path) -> None:
    begun(tmp_path, "abc", "norms", "products")
    found = gpu.begin(tmp_path, {**MACHINE, "commit": "abc", "torch": "2.12.0"}, ["products"])
    assert "- norms: measured at torch 2.11.0" in gpu_page.page(found)


@pytest.mark.parametrize("text", ["{", "null", '{"rows": []}', "[1]"])
def test_what_is_no_record_is_not_kept(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nvidia-h200.json").write_text(text)
    assert gpu.begin(tmp_path, MACHINE, ["norms"])["rows"] == []
    assert "is not kept, no record of this script" in capsys.readouterr().err


def python(source: str) -> list[str]:
    return [sys.executable, "-c", source]


def test_rows_of_a_process_that_dies_are_kept() -> None:
    line = json.dumps(gpu_rows.row("products", "x", 1, "triton int8", lambda: 1.0))
    source = f"print({line!r}, flush=True); print('noise'); import os; os._exit(3)"
    rows = gpu.collect(python(source), "products", time.monotonic() + 60)
    assert [row["value"] for row in rows] == [1.0, None]
    assert rows[1]["error"] == "its process ended with status 3"


def test_rows_of_a_process_that_hangs_are_kept() -> None:
    line = json.dumps(gpu_rows.row("products", "x", 1, "triton int8", lambda: 1.0))
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


def test_a_stopped_stage_may_say_what_it_found_and_leaves_no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LAST_WORDS", 2.0)
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    speaks = child + """
try: time.sleep(600)
except KeyboardInterrupt: print('two failed', flush=True)"""
    code, printed = gpu._run(python(speaks), time.monotonic() + 5)
    assert (code, printed) == (124, "two failed\n")
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True); time.sleep(600)"
    code, printed = gpu._run(python(deaf), time.monotonic() + 5)
    assert (code, printed) == (124, "on\n")
    assert gpu._run(python("import os; print(os.environ['ONE'])"), time.monotonic() + 60, ONE="1") == (0, "1\n")
    started = time.monotonic()
    line = json.dumps(gpu_rows.row("products", "x", 1, "triton int8", lambda: 1.0))
    rows = gpu.collect(python(f"print({line!r}, flush=True);{child}time.sleep(600)"), "products", started + 3)
    assert [row["error"] for row in rows] == ["", "out of time"]
    assert time.monotonic() - started < 30, "the child kept the output open"


ALONE = """tests/gpu/test_a.py::test_x[split swap-(1, 2)] PASSED [ 10%]
tests/gpu/test_a.py::test_x[tma swap-(1, 2)] FAILED [ 20%]
tests/gpu/test_a.py::test_y SKIPPED (needs 20 GiB) [ 30%]
tests/gpu/test_a.py::test_z ERROR [ 40%]
"""
SHARED = """tests/gpu/test_a.py::test_x[split swap-(1, 2)]
[gw3] [ 10%] PASSED tests/gpu/test_a.py::test_x[split swap-(1, 2)]
tests/gpu/test_a.py::test_y
[gw0] [ 20%] FAILED tests/gpu/test_a.py::test_x[tma swap-(1, 2)]
[gw1] [ 30%] SKIPPED tests/gpu/test_a.py::test_y
[gw1] [ 40%] ERROR tests/gpu/test_a.py::test_z
"""
END = """=========================== short test summary info ============================
FAILED tests/gpu/test_a.py::test_x[tma swap-(1, 2)] - AssertionError: 3 != 4
ERROR tests/gpu/test_a.py::test_z
==================== 1 failed, 1 passed, 1 skipped, 1 error in 1.99s ====================
"""


@pytest.mark.parametrize("printed", [ALONE, SHARED], ids=["alone", "shared"])
def test_what_failed_is_known_also_when_tests_are_stopped(printed: str) -> None:
    names = ["FAILED tests/gpu/test_a.py::test_x[tma swap-(1, 2)]", "FAILED tests/gpu/test_a.py::test_z"]
    stopped = gpu.outcome(gpu.TIMED_OUT, printed)
    assert stopped["failures"] == names
    assert stopped["summary"] == "stopped at its limit, 4 finished, 2 of them failed; exit 124"
    ended = gpu.outcome(1, printed + END)
    assert ended["failures"] == [names[0] + " - AssertionError: 3 != 4", names[1]]
    assert ended["summary"] == "1 failed, 1 passed, 1 skipped, 1 error in 1.99s"
    spoke = gpu.outcome(gpu.TIMED_OUT, printed + END)
    assert spoke["summary"].startswith("stopped at its limit, 4 finished, 2 of them failed; 1 failed")
    assert spoke["failures"] == ended["failures"]


@pytest.mark.parametrize("parallel", [True, False])
def test_tests_run_on_several_processes_where_they_can(parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[tuple[list[str], dict[str, str]]] = []

    def ran(command: list[str], end: float, **environment: str) -> tuple[int, str]:
        commands.append((command, environment))
        return 0, "=== 3 passed in 1s ==="

    monkeypatch.setattr(gpu, "_run", ran)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object() if parallel or name != "xdist" else None)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 16)
    assert gpu.run_tests(time.monotonic() + 5) == {"failed": False, "summary": "3 passed in 1s", "failures": []}
    ((command, environment),) = commands
    assert ("-n 14 --dist load" in " ".join(command)) == parallel
    assert environment["TORCHINDUCTOR_COMPILE_THREADS"] == "2"


def test_stages_end_within_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """If each takes all it may: the models still have three minutes, and the sanitizer its own."""
    now = [1000.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    lasted = {}
    for stage in gpu.STAGES:
        end = gpu.end_of(stage, 1000.0 + 585, gpu.STAGES)
        lasted[stage], now[0] = end - now[0], end
    assert now[0] == 1585
    assert lasted == {"tests": 160, "tune": 95, "products": 70, "norms": 30, "models": 190, "sanitizer": 40}
    now[0] = 1000.0
    assert gpu.end_of("models", 1585.0, ["models"]) == 1585


def test_stages_in_their_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tiles are measured before what uses them, whatever the order asked for, and the report says which are used."""
    ran: list[str] = []

    def collect(command: list[str], name: str, end: float) -> list[dict[str, Any]]:
        ran.append(command[3])
        if name == "tune":
            assert 80 < float(command[-1]) < 95 - gpu.LAST_WORDS + 0.1
        return []

    monkeypatch.setattr(gpu, "collect", collect)
    monkeypatch.setattr(gpu, "run_tests", lambda end: ran.append("tests") or {"failed": False, "summary": "1 passed"})
    monkeypatch.setattr(gpu, "run_sanitizer", lambda end: ran.append("sanitizer") or {"failed": False, "summary": ""})
    monkeypatch.setattr(gpu, "table_in_use", lambda: {"failed": False, "summary": "96 of nvidia_h200.json, measured"})
    monkeypatch.setattr(gpu, "machine", lambda: MACHINE)
    monkeypatch.setattr(gpu, "run_models", lambda end, layers, variants: ran.append(f"{layers} layers") or [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.main(["--out", str(tmp_path), "--only", "models", "sanitizer", "tests", "products", "tune"]) == 0
    assert ran == ["tests", "tune", "products", "16 layers", "sanitizer"]
    assert "- tiles: 96 of nvidia_h200.json, measured" in (tmp_path / "nvidia-h200.md").read_text()


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
