"""The command line, as a user runs it."""

import os
import subprocess
import sys
from typing import NoReturn

import pytest

from qcompile import cli

EASY = [["--help"], ["--version"], ["frobnicate"], *([command, "--help"] for command in ("quantize", "serve", "tune"))]
MISTAKES = [["quantize"], ["quantize", "MODEL", "--out", "x", "--samples", "0"], ["tune"], ["tune", "--shape", "1"]]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "qcompile", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **environment}
    )


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


def test_an_interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("qcompile.machine.report", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "qcompile: interrupted\n"


def test_version() -> None:
    assert run("--version").stdout.startswith("qcompile 0.")


def test_every_command_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    for command in cli.COMMANDS:
        name = command.__name__.rpartition(".")[2]
        assert f"\n    {name} " in printed
        assert f"`qcompile {name}" in (command.__doc__ or "")


def test_help_and_mistakes_wait_for_no_library() -> None:
    code = f"""
import contextlib, sys
from qcompile import cli
for arguments in {[*EASY, *MISTAKES]!r}:
    with contextlib.suppress(SystemExit):
        assert cli.main(arguments) == 2, arguments
heavy = {{"torch", "transformers", "rich", "numpy"}} & {{*sys.modules}}
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, timeout=120)
