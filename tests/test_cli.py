"""The command line, as a user runs it."""

import json
import os
import subprocess
import sys

import pytest

from qcompile import cli
from qcompile.passes import PASSES


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "qcompile", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **environment}
    )


def test_passes_lists_every_pass_and_both_pipelines(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["passes"]) == 0
    printed = capsys.readouterr().out
    for kind in PASSES:
        assert kind.name in printed
    assert "alpha=0.5" in printed
    assert "quantize: canonicalize,find_linears,smooth,quantize_linears" in printed


def test_passes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["passes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed["passes"]] == [kind.name for kind in PASSES]
    assert set(listed["pipelines"]) == {"observe", "quantize"}


def test_a_mistake_is_one_line_and_status_2() -> None:
    result = run("demo", "--windows", "0")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "windows" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_command_is_status_2() -> None:
    result = run("frobnicate")
    assert result.returncode == 2
    assert "frobnicate" in result.stderr


def test_version() -> None:
    assert run("--version").stdout.startswith("qcompile 0.")
