"""The picture of a benchmark: what is drawn, where it is written, what is refused."""

import re
import sys
from pathlib import Path

import pytest

from qcompile.bench.bench import Timing
from qcompile.bench.plot import OURS, check_plot, write_plot
from qcompile.errors import ConfigError

CASES = ("decode, batch 1", "prefill 128")


def timing(variant: str, milliseconds: float) -> Timing:
    seconds = [milliseconds / 1e3 * factor for factor in (0.9, 1.0, 1.1, 1.2, 1.0)]
    return Timing(variant, dict.fromkeys(CASES, seconds), {}, {}, 0)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With its text as text."""
    matplotlib = pytest.importorskip("matplotlib")
    path = tmp_path_factory.mktemp("plot") / "bench.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        write_plot([timing("inductor bf16", 20.0), timing("w8a8 int8", 10.0)], path)
    assert [file.name for file in path.parent.iterdir()] == ["bench.svg"]
    return path.read_text(encoding="utf-8")


def test_every_case_and_variant_has_a_bar_with_its_median(drawn: str) -> None:
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    assert [texts.count(case) for case in CASES] == [1, 1]
    assert [texts.count(name) for name in ("inductor bf16", "w8a8 int8")] == [2, 2]
    bars = [text for text in texts if text == "20"] + [text for text in texts if text == "10"]
    assert len(bars) >= 4  # ticks may say 10 and 20 too


def test_ours_is_coloured(drawn: str) -> None:
    assert drawn.count(f"fill: {OURS}") == len(CASES)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("plot.txt", "a plot must be a file ending in"), ("plot", "a plot must be"), ("missing/plot.svg", "be written")],
)
def test_a_place_that_cannot_be_is_named(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_plot(tmp_path / name)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"install qcompile\[bench\]"):
        check_plot(tmp_path / "plot.svg")
