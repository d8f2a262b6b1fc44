"""scripts/gpu.py and its stages, without a GPU: rows that fail are recorded, processes that die or hang too."""

import argparse
import functools
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

from qcompile.commands import tune
from qcompile.lowering import tiles
from qcompile.lowering.devices import device_of
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import Row, Tile

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu, stages, variants = script("gpu"), script("gpu_rows"), script("gpu_variant")
gpu_models, gpu_page = gpu.gpu_models, gpu.gpu_page
MACHINE = {"device": "NVIDIA H200", "torch": "2.11.0", "commit": "abc", "date": "2026-01-01"}


def test_every_row_is_measured_or_says_why_not() -> None:
    looked: list[str] = []

    def clock_of(variant: str, m: int, n: int, k: int) -> Any:
        if variant == "triton fp8" and m == 128:
            raise RuntimeError("out of\nshared memory")
        times = iter([float(m)] * (stages.LOOKS - 1) + [1e6])  # one look was disturbed
        return lambda: (looked.append(variant), next(times))[1]

    rows = list(stages.product_rows(clock_of, lambda m, n, k: m > 2048))
    beside_norms = 2 * len(stages.PRODUCTS)  # 1,024 tokens, of the two products behind a norm
    assert len(rows) == len(stages.SHAPES) * len(stages.TOKENS) * len(stages.PRODUCTS) + beside_norms
    assert looked[: len(stages.PRODUCTS) + 1] == [*stages.PRODUCTS, stages.PRODUCTS[0]], "in turns"
    assert all(row["value"] in (row["tokens"], None) for row in rows), "medians"
    products = {(row["name"], row["tokens"]) for row in rows}
    assert all((f"{model} qkv", m) in products for model in ("8B", "70B") for m in stages.NORM_TOKENS)
    failed = [row for row in rows if row["value"] is None]
    assert len(failed) == len(stages.SHAPES)
    assert {row["error"] for row in failed} == {"RuntimeError: out of"}
    assert json.loads(json.dumps(rows)) == rows
    assert len(list(stages.norm_rows(lambda variant, m, k: 1.0))) == 2 * 5 * len(stages.NORMS)
    cublas = [row for row in rows if row.get("cublas")]
    assert {(row["variant"], row["tokens"]) for row in cublas} == {("triton fp8", 8192)}
    assert len(cublas) == len(stages.SHAPES)
    assert list(gpu_models.CASES)[:2] == ["decode, batch 1", "prefill 2048"], "what matters most comes first"


def test_a_model_answers_what_it_is_asked() -> None:
    class Model:
        def ready(self, case: str, layers: int) -> Any:
            if case == "prefill 2048":
                raise RuntimeError("out of\nmemory")
            return lambda: {"models": [float(layers)]}

    said: list[dict[str, Any]] = []
    cases = list(gpu_models.CASES)
    variants.answer_for(Model(), 2, cases, ["time\n", "time\n", "next\n", "time\n"], said.append)
    assert [list(word) for word in said] == [
        ["ready", "seconds"], ["times"], ["times"], ["failed", "error"], ["ready", "seconds"], ["times"]]  # fmt: skip
    assert said[1] == {"times": {"models": [2.0]}}
    assert said[3] == {"failed": "prefill 2048", "error": "RuntimeError: out of"}
    assert said[4]["ready"] == "decode, batch 32"
    said.clear()

    class Failing:
        def ready(self, case: str, layers: int) -> Any:
            return functools.partial(stages._fail, RuntimeError("an illegal\naddress"))

    variants.answer_for(Failing(), 2, cases, ["time\n", "time\n"], said.append)
    assert said[1:] == [{"failed": cases[0], "error": "RuntimeError: an illegal"}], "and no other case after that"
    said.clear()
    variants.answer_for(Model(), 2, cases[:1], ["time\n", "next\n"], said.append)
    assert [list(word) for word in said] == [["ready", "seconds"], ["times"]], "no other case than told"


def test_the_model_is_made_layer_by_layer() -> None:
    """Of the shape asked for, every layer of its own, converted once, and it runs with a cache."""
    converted: list[Any] = []
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": 64}  # fmt: skip
    model = variants.llama(3, converted.append, "cpu", **sizes)
    layers = list(model.model.layers)
    assert converted == layers
    assert len({id(layer) for layer in layers}) == 3
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2]
    weights = [layer.mlp.up_proj.weight for layer in layers]
    assert all(weight.dtype == torch.bfloat16 and 0.015 < weight.float().std() < 0.025 for weight in weights)
    assert not torch.equal(weights[0], weights[1])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    cache = variants.static_cache(model)
    with torch.no_grad():
        step = model(input_ids=torch.ones(2, 5, dtype=torch.long), past_key_values=cache)
        whole = model(input_ids=torch.ones(2, 5, dtype=torch.long), use_cache=False)
    assert len(cache.layers) == 3
    torch.testing.assert_close(step.logits, whole.logits, rtol=0.05, atol=0.05)


def products_found() -> list[tune.Found]:
    """As the search finds them: 8B's first, one that nothing ran for."""
    shapes = list(stages.SHAPES.values())[:2]
    found = [tune.Found(dtype, m, n, k, Tile(16, 32, 64), 10.0, 12.0)
             for n, k in shapes for m in (16, 8192) for dtype in ("int8", "fp8")]  # fmt: skip
    return [*found[:-1], tune.Found("fp8", 8192, *shapes[1], None)]


def test_tiles_are_kept_as_they_are_found() -> None:
    found, kept = products_found(), []
    rows = list(stages.tune_rows(found, lambda all_found: kept.append(len(all_found)), lambda: False))
    assert kept == list(range(1, len(found))), "all but the one that nothing ran for"
    assert [row["value"] for row in rows] == [12.0, 10.0] * (len(found) - 1) + [None, None]
    assert rows[-1]["error"] == "RuntimeError: no tile ran"
    assert {row["name"] for row in rows} == {"8B qkv", "8B o"}
    assert {row["tokens"] for row in rows} == {16, 8192}
    assert json.loads(json.dumps(rows)) == rows
    page = gpu_page.page({"machine": MACHINE, "parts": {}, "checks": {}, "rows": rows})
    assert "| 8B qkv | int8 | 1.20× | 1.20× |" in page
    assert "| 8B o | fp8 | 1.20× | – |" in page


def test_tiles_that_there_was_no_time_for_are_said() -> None:
    clock = iter([False, False, True])
    kept: list[int] = []
    rows = list(stages.tune_rows(products_found(), lambda all_found: kept.append(len(all_found)), lambda: next(clock)))
    assert kept == [1, 2]
    assert len(rows) == 5
    assert (rows[-1]["name"], rows[-1]["error"]) == ("what is left", "out of time")
    page = {"machine": MACHINE, "parts": {}, "checks": {}}
    assert "- tune, tiles: 1 rows, out of time" in gpu_page.page({**page, "rows": rows})
    assert "## Tiles" not in gpu_page.page({**page, "rows": rows[-1:]})


def test_a_cards_table_grows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What an earlier run measured and this one did not get to stays in it."""
    target = Target("cuda", 90, name="NVIDIA H200", processors=132)

    class Bench:
        def __init__(self, target: Target) -> None:
            self.compiled: list[str] = []

        def compile_ahead(self, shapes: Any, tokens: Any, dtypes: list[str], told: Any) -> None:
            assert dtypes == ["int8", "fp8"]

        def measure(self, m: int, n: int, k: int, dtype: str, tiles: list[Tile]) -> dict[Tile, float]:
            return {tile: float(tile.block_m) for tile in tiles}

    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    for path in (ROOT / "lowering" / "tiles").glob("sm*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(stages, "_here", lambda: (target, device_of(target)))
    monkeypatch.setattr(tune, "Bench", Bench)
    monkeypatch.setattr(tune, "_triton_version", lambda: "3.6")
    old = Row("int8", 16, 64, 64, Tile(16, 16, 32)), Row("int8", 16, 6144, 4096, Tile(128, 128, 128))
    tune.write(tmp_path / "nvidia_h200.json", tune.table_of(old, target))
    rows = list(stages.tune_here(1e9))
    table = tiles.load(tmp_path / "nvidia_h200.json")
    assert table.device == "NVIDIA H200"
    assert len(table.rows) == 1 + len(stages.SHAPES) * len(stages.TUNED_TOKENS) * 2 == 1 + len(rows) / 2
    assert table.rows[0] == old[0]
    assert old[1] not in table.rows
    tiles.card.cache_clear()
    assert next(stages.tune_here(-1.0))["error"] == "out of time"
    assert tiles.load(tmp_path / "nvidia_h200.json") == table
    tiles.card.cache_clear()


def report(fast: float = 1.0) -> dict[str, Any]:
    times = {"triton int8": 10 * fast, "triton fp8": 10 * fast, "_scaled_mm fp8": 11.0, "_int_mm + scales": 14.0,
             "bf16 matmul": 20.0}  # fmt: skip
    norms = {"norm bf16": 5.0, "norm + quantize int8": 5.2, "norm + quantize fp8": 9.0}
    models = {"inductor bf16": 20.0, "w8a8 int8": 10.0 * fast, "w8a8 fp8": 10.0 * fast}
    rows = [stages.row("products", name, m, variant, lambda t=t: t)
            for name in stages.SHAPES for m in stages.TOKENS for variant, t in times.items()]  # fmt: skip
    rows += [stages.row("norms", "8B", m, variant, lambda t=t: t) for m in (1, 2048) for variant, t in norms.items()]
    rows += [stages.row(way, case, 32, v, lambda t=t + more: t)
             for way, more in (("models", 0.0), ("waited", 1.0))
             for case in gpu_models.CASES for v, t in models.items()]  # fmt: skip
    rows += [stages.row("compile", "prefill 2048", 32, v, lambda: 41.4) for v in models]
    rows.append(gpu._unfinished("torchao int8", "its process ended with status 1"))
    checks = {"tests": {"failed": False, "summary": "9 passed"}}
    return {"machine": MACHINE, "parts": {}, "checks": checks, "rows": rows}


def test_the_page_holds_every_figure_against_its_goal(tmp_path: Path) -> None:
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
    gpu.write(report(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nvidia-h200.json", "nvidia-h200.md"]
    assert json.loads((tmp_path / "nvidia-h200.json").read_text()) == report()
    assert len(good.splitlines()) <= 150, "a page of docs"


def test_who_computes_is_on_the_page() -> None:
    """cuBLAS against itself is no goal, and what our kernels take there is said too."""
    found = report()
    for row in found["rows"]:
        if (row["name"], row["variant"], row["tokens"]) == ("8B qkv", "triton fp8", 8192):
            row |= {"cublas": True, "value": 11.3}
    tile = Tile(16, 32, 64, cublas=True)
    found["rows"] += stages.tune_rows(
        [tune.Found("fp8", 8192, 6144, 4096, tile, 10.0, 12.0, 11.0)], lambda all_found: None, lambda: False
    )
    page = gpu_page.page(found)
    assert "| 8B qkv | 8192 | 10.0 | 11.3 | 20.0 | same | 1.40× | 2.00× | 1.77× |" in page
    assert "| 8B o | 8192 | 10.0 | 10.0 | 20.0 | 1.10× | 1.40× | 2.00× | 2.00× |" in page
    assert "| 8B qkv | fp8 | 1.20× (1.09×) |" in page


def begun(folder: Path, commit: str, *stages: str, layers: int = 32, variants: Any = None) -> dict[str, Any]:
    """A run of some stages that finds nothing but one row and one check of each."""
    facts = {**MACHINE, "commit": commit}
    found = gpu.begin(folder, facts, stages)
    arguments = argparse.Namespace(layers=layers, variants=variants or gpu_models.MODELS)
    for stage in stages:
        rows = [stages_row(stage, layers, variant) for variant in arguments.variants] if stage == "models" else [
            stages_row(stage, 1, commit)]  # fmt: skip
        gpu.renew(found, stage, arguments, rows, {stage: {"failed": False, "summary": commit}})
        gpu.write(found, folder)
    return found


def stages_row(stage: str, tokens: int, variant: str) -> dict[str, Any]:
    return stages.row(stage, "decode, batch 1", tokens, variant, lambda: 1.0)


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


def test_parts_of_other_versions_are_said(tmp_path: Path) -> None:
    begun(tmp_path, "abc", "norms", "products")
    found = gpu.begin(tmp_path, {**MACHINE, "commit": "abc", "torch": "2.12.0"}, ["products"])
    assert "- norms: measured at torch 2.11.0" in gpu_page.page(found)


@pytest.mark.parametrize("text", ["{", "null", '{"rows": []}', "[1]"])
def test_what_is_no_record_is_not_kept(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nvidia-h200.json").write_text(text)
    assert gpu.begin(tmp_path, MACHINE, ["norms"])["rows"] == []
    assert "is not kept, no record of this script" in capsys.readouterr().err


def test_failures_are_on_the_page() -> None:
    broken = report()
    broken["checks"] = {"tests": {"failed": True, "summary": "1 failed", "failures": ["FAILED tests/gpu/a.py::b"]}}
    page = gpu_page.page(broken)
    assert "- tests: FAILED, 1 failed" in page
    assert "  - `FAILED tests/gpu/a.py::b`" in page
    assert gpu_page.page({"machine": MACHINE, "parts": {}, "checks": {}, "rows": []}).startswith("# NVIDIA H200")


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


def test_a_stopped_stage_may_say_what_it_found_and_leaves_no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LAST_WORDS", 4.0)
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    speaks = child + """
try: time.sleep(600)
except KeyboardInterrupt: print('two failed', flush=True)"""
    code, printed = gpu._run(python(speaks), time.monotonic() + 8)
    assert (code, printed) == (124, "two failed\n")
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True); time.sleep(600)"
    code, printed = gpu._run(python(deaf), time.monotonic() + 7)
    assert (code, printed) == (124, "on\n")
    assert gpu._run(python("import os; print(os.environ['ONE'])"), time.monotonic() + 60, ONE="1") == (0, "1\n")
    started = time.monotonic()
    line = json.dumps(stages.row("products", "x", 1, "triton int8", lambda: 1.0))
    rows = gpu.collect(python(f"print({line!r}, flush=True);{child}time.sleep(600)"), "products", started + 4)
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
