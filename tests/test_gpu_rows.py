"""The rows of scripts/gpu_rows.py, with clocks and searches that are not a GPU's."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qcompile.bench import tuning
from qcompile.lowering import tiles
from qcompile.lowering.devices import device_of
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import Row, Tile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import gpu_models
import gpu_page
import gpu_rows

ROOT = Path(__file__).parents[1]
MACHINE = {"device": "NVIDIA H200"}


def test_every_row_is_measured_or_says_why_not() -> None:
    looked: list[str] = []

    def clock_of(variant: str, m: int, n: int, k: int) -> Any:
        if variant == "triton fp8" and m == 128:
            raise RuntimeError("out of\nshared memory")
        times = iter([float(m)] * (gpu_rows.LOOKS - 1) + [1e6])  # one look was disturbed
        return lambda: (looked.append(variant), next(times))[1]

    rows = list(gpu_rows.product_rows(clock_of, lambda m, n, k: m > 2048))
    beside_norms = 2 * len(gpu_rows.PRODUCTS)  # 1,024 tokens, of the two products behind a norm
    assert len(rows) == len(gpu_rows.SHAPES) * len(gpu_rows.TOKENS) * len(gpu_rows.PRODUCTS) + beside_norms
    assert looked[: len(gpu_rows.PRODUCTS) + 1] == [*gpu_rows.PRODUCTS, gpu_rows.PRODUCTS[0]], "in turns"
    assert all(row["value"] in (row["tokens"], None) for row in rows), "medians"
    products = {(row["name"], row["tokens"]) for row in rows}
    assert all((f"{model} qkv", m) in products for model in ("8B", "70B") for m in gpu_rows.NORM_TOKENS)
    failed = [row for row in rows if row["value"] is None]
    assert len(failed) == len(gpu_rows.SHAPES)
    assert {row["error"] for row in failed} == {"RuntimeError: out of"}
    assert json.loads(json.dumps(rows)) == rows
    assert len(list(gpu_rows.norm_rows(lambda variant, m, k: 1.0))) == 2 * 5 * len(gpu_rows.NORMS)
    cublas = [row for row in rows if row.get("cublas")]
    assert {(row["variant"], row["tokens"]) for row in cublas} == {("triton fp8", 8192)}
    assert len(cublas) == len(gpu_rows.SHAPES)
    assert list(gpu_models.CASES)[:2] == ["decode, batch 1", "prefill 2048"], "what matters most comes first"


def products_found() -> list[tuning.Found]:
    """As the search finds them: 8B's first, one that nothing ran for."""
    shapes = list(gpu_rows.SHAPES.values())[:2]
    found = [tuning.Found(dtype, m, n, k, Tile(16, 32, 64), 10.0, 12.0)
             for n, k in shapes for m in (16, 8192) for dtype in ("int8", "fp8")]  # fmt: skip
    return [*found[:-1], tuning.Found("fp8", 8192, *shapes[1], None)]


def test_tiles_are_kept_as_they_are_found() -> None:
    found, kept = products_found(), []
    rows = list(gpu_rows.tune_rows(found, lambda all_found: kept.append(len(all_found)), lambda: False))
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
    found = products_found()
    rows = list(gpu_rows.tune_rows(found, lambda all_found: kept.append(len(all_found)), lambda: next(clock)))
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
    monkeypatch.setattr(gpu_rows, "_here", lambda: (target, device_of(target)))
    monkeypatch.setattr(tuning, "Bench", Bench)
    monkeypatch.setattr(tuning, "_triton_version", lambda: "3.6")
    old = Row("int8", 16, 64, 64, Tile(16, 16, 32)), Row("int8", 16, 6144, 4096, Tile(128, 128, 128))
    (tmp_path / "nvidia_h200.json").write_text(tuning.table_of(old, target).to_json())
    rows = list(gpu_rows.tune_here(1e9))
    table = tiles.load(tmp_path / "nvidia_h200.json")
    assert table.device == "NVIDIA H200"
    assert len(table.rows) == 1 + len(gpu_rows.SHAPES) * len(gpu_rows.TUNED_TOKENS) * 2 == 1 + len(rows) / 2
    assert table.rows[0] == old[0]
    assert old[1] not in table.rows
    tiles.card.cache_clear()
    assert next(gpu_rows.tune_here(-1.0))["error"] == "out of time"
    assert tiles.load(tmp_path / "nvidia_h200.json") == table
    tiles.card.cache_clear()
