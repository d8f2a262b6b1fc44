"""qcompile passes: every pass and both pipelines, as text and as JSON."""

import json

import pytest

from qcompile import cli
from qcompile.passes import PASSES


def test_every_pass_and_both_pipelines_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["passes"]) == 0
    printed = capsys.readouterr().out
    for kind in PASSES:
        assert kind.name in printed
    assert "alpha=0.5" in printed
    assert "quantize: canonicalize,find_linears,smooth,quantize_linears" in printed


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["passes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed["passes"]] == [kind.name for kind in PASSES]
    assert set(listed["pipelines"]) == {"observe", "quantize"}
