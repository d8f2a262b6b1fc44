"""Pages that come from the code are what the code says."""

import dataclasses
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from qcompile.config import Config
from qcompile.pass_pipeline import Pipeline
from qcompile.passes import PASSES, quantizing

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "generate_docs.py"
PAGES: dict[str, str] = runpy.run_path(str(SCRIPT))["pages"]()


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_not_stale(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == PAGES[name], "run: make docs"


def test_every_option_is_listed_and_told() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| `(.+)` \| (.+) \|$", PAGES["options.md"], re.M)
    fields = dataclasses.fields(Config)
    assert [row[0] for row in rows] == [field.name for field in fields]
    assert all(len(told) > 10 for *_, told in rows)
    defaults = {row[0]: row[2] for row in rows}
    assert (defaults["alpha"], defaults["dtype"], defaults["ignore"]) == ("0.5", '"int8"', '("lm_head",)')


def test_every_pass_has_a_page_with_its_options() -> None:
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGES["passes.md"], re.M | re.S))
    assert list(sections) == [kind.name for kind in PASSES]
    for kind in PASSES:
        text = sections[kind.name]
        assert f"Stage {kind.stage}, bound {kind.bound}." in text
        assert re.findall(r"^\| `(\w+)` \|", text, re.M) == [field.name for field in dataclasses.fields(kind)]
        assert text.count("```") % 2 == 0
    assert "`qcompile.rescale`" in sections["quantize_linears"]


def test_the_pipelines_parse() -> None:
    listed: dict[str, Any] = dict(re.findall(r"^\| ([^|]+) \| `(canonicalize.*)` \|$", PAGES["passes.md"], re.M))
    assert len(listed) == 4
    assert Pipeline.from_text(listed["a quantized run"], PASSES) == quantizing(Config(calibrate=1))


def test_a_stale_page_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(SCRIPT))
    module["main"].__globals__["DOCS"] = tmp_path
    module["sys"].argv, kept = ["generate_docs.py", "--check"], module["sys"].argv
    try:
        assert module["main"]() == 1
        assert "docs/options.md is stale; run: make docs" in capsys.readouterr().out
        module["sys"].argv = ["generate_docs.py"]
        assert module["main"]() == 0
        assert {path.name for path in tmp_path.iterdir()} == set(PAGES)
        module["sys"].argv = ["generate_docs.py", "--check"]
        assert module["main"]() == 0
    finally:
        module["sys"].argv = kept
