"""`make demo`'s work, on fewer windows: the table's claims hold in the run that prints them."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from qcompile import demonstration
from qcompile.errors import ConfigError


@pytest.mark.inductor
def test_demo_shows_what_smoothing_is_for(tmp_path: Path) -> None:
    torch._dynamo.reset()
    printed = io.StringIO()
    rows = demonstration.run(windows=16, dump=str(tmp_path / "dump"), console=Console(file=printed, width=100))
    torch._dynamo.reset()

    plain, injected = rows["as trained"], rows["outliers injected"]
    assert [row.variant for row in plain] == [
        "float32, eager",
        "float32, Inductor",
        "W8A8, no smoothing",
        "W8A8, smoothed",
    ]
    base = plain[0].score
    assert base.perplexity < 60, "real weights: uniform guessing would give the vocabulary's size"
    assert abs(plain[1].score.nll - base.nll) < 1e-4
    assert abs(plain[3].score.nll - base.nll) < 0.01
    assert injected[0].score.nll == pytest.approx(base.nll, abs=1e-4), "the injection changes no function"
    assert injected[2].score.nll - base.nll < 0.01
    assert injected[1].score.nll - base.nll > 2 * abs(injected[2].score.nll - base.nll)

    text = printed.getvalue()
    for row in plain:
        assert row.variant in text
    assert "def " in text.split("Sample")[1]
    assert list((tmp_path / "dump").glob("graph-*/*.smooth.diff"))


def test_a_folder_for_dumps_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(demonstration, "load", lambda: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="dumps need a folder that can be written"):
        demonstration.run(dump=str(tmp_path / "file"))
