"""Bench files as data."""

import json
from pathlib import Path
from typing import Any

import pytest

from qcompile.bench import bench
from qcompile.errors import ConfigError
from qcompile.reporting.speed import read_bench

ROOF = {
    "bytes_per_second": 1e10, "operations_per_second": 1e12,
    "points": [{"name": "q_proj", "intensity": 8.0, "operations_per_second": 5e10}],
}  # fmt: skip


def bench_file(path: Path, **changes: Any) -> Path:
    timings = [
        bench.Timing(variant, {"decode, batch 1": [factor, 2 * factor, 30 * factor]}, {}, {}, 2**30)
        for variant, factor in (("inductor bf16", 0.004), ("w8a8 int8", 0.002))
    ]
    path.write_text(json.dumps(json.loads(bench.to_json(timings)) | changes))
    return path


def test_medians_in_milliseconds(tmp_path: Path) -> None:
    found = read_bench(bench_file(tmp_path / "b.json"))
    assert found["variants"] == ["inductor bf16", "w8a8 int8"]
    assert found["cases"] == ["decode, batch 1"]
    assert found["milliseconds"] == [[pytest.approx(8.0), pytest.approx(4.0)]]
    assert found["memory"] == [1024.0, 1024.0]
    assert dict(found["machine"])["torch"]
    assert found["roofline"] is None


def test_a_roofline(tmp_path: Path) -> None:
    found = read_bench(bench_file(tmp_path / "b.json", roofline=ROOF))["roofline"]
    assert found == {"bandwidth": 1e10, "peak": 1e12, "points": [("q_proj", 8.0, 5e10)]}


@pytest.mark.parametrize(
    "changes",
    [{"timings": []}, {"timings": [{}]}, {"machine": 3}, {"roofline": {}}, {"roofline": ROOF | {"points": [{}]}}],
)
def test_other_files_are_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be what `qcompile bench --json` printed") as raised:
        read_bench(bench_file(tmp_path / "b.json", **changes))
    assert "\n" not in str(raised.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the bench file must be readable"):
        read_bench(tmp_path / "none.json")
