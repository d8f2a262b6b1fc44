"""qcompile bench: its options reach the work, and what is timed is printed and drawn."""

import json
from pathlib import Path
from typing import Any

import pytest

from qcompile import cli
from qcompile.bench import bench
from qcompile.bench.bench import Timing

CASE = "decode, batch 1"
TIMED = [Timing("float", {CASE: [1e-3, 2e-3]}, {CASE: 2.0}, {CASE: 0.5}, 2**30)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []

    def timed(model: str, **options: Any) -> list[Timing]:
        options.pop("told")("timing")
        found.append((model, options))
        return TIMED

    monkeypatch.setattr(bench, "bench", timed)
    return found


def test_options(calls: list[tuple[str, dict[str, Any]]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "llama-100m"]) == 0
    printed = capsys.readouterr()
    assert printed.out == bench.table(TIMED) + "\n"
    assert printed.err == "timing\n"
    more = ["--variants", "eager bf16", "--cases", CASE, "--rounds", "3", "--threads", "1", "--json"]
    assert cli.main(["bench", "llama-100m", *more]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(bench.to_json(TIMED))
    assert calls == [
        ("llama-100m", {"rounds": 15, "threads": 0}),
        ("llama-100m", {"rounds": 3, "threads": 1, "variants": ["eager bf16"], "cases": [CASE]}),
    ]


def test_a_plot_is_drawn_or_refused_before_anything_is_timed(
    calls: list[tuple[str, dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "llama-100m", "--plot", str(tmp_path / "x.svg")]) == 0
    assert (tmp_path / "x.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert cli.main(["bench", "llama-100m", "--plot", str(tmp_path / "x.doc")]) == 2
    assert len(calls) == 1
    assert capsys.readouterr().err.count("\n") == 2
