"""QCOMPILE_DEBUG adds observers by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import compiled
from graphs import ReluMLP, captured

from qcompile import debug, passes, validate
from qcompile.config import Config
from qcompile.dump import DumpTo
from qcompile.errors import ConfigError
from qcompile.verify import Verify


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(debug.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run() -> torch.Tensor:
    with torch.no_grad():
        y: torch.Tensor = compiled(ReluMLP())(torch.randn(2, 16))
    return y


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", set()),
        (" , ", set()),
        ("dump", {"dump"}),
        ("dump,time", {"dump", "time"}),
        (" verify , dump ", {"dump", "verify"}),
    ],
)
def test_switches_are_names(text: str, names: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(debug.VARIABLE, text)
    assert debug.switches() == names


def test_an_unknown_name_is_refused_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(debug.VARIABLE, "dump,trace")
    for _ in range(2):
        with pytest.raises(ConfigError, match="^QCOMPILE_DEBUG takes dump, time, verify; got 'trace'$"):
            run()


def test_nothing_set_adds_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert debug.with_environment(Config()) == Config()
    run()
    assert list(folder.iterdir()) == []
    assert capfd.readouterr().err == ""


def test_dump_writes_beside_the_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(debug.VARIABLE, "dump")
    run()
    assert (folder / debug.DEFAULT_FOLDER / "graph-000" / "00.canonicalize.after.py").is_file()


def test_the_option_decides_where(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(debug.VARIABLE, "dump")
    assert debug.with_environment(Config(dump="elsewhere")).dump == "elsewhere"
    monkeypatch.delenv(debug.VARIABLE)
    with torch.no_grad():
        compiled(ReluMLP(), dump=folder / "elsewhere")(torch.randn(2, 16))
    assert [path.name for path in folder.iterdir()] == ["elsewhere"]


def test_time_prints_a_line_per_pass(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(debug.VARIABLE, "time")
    run()
    shown = capfd.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("qcompile: ")]
    assert lines[0].startswith("qcompile: graph of ")
    assert [line.split()[2].partition("{")[0] for line in lines[1:]] == [
        step.name for step in passes.quantizing(Config()).passes
    ]
    assert all(line.endswith(" edits") for line in lines[1:])
    assert shown.out == ""


def test_verify_turns_on_both_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("qcompile.verify.check_metadata", lambda gm: seen.append("metadata"))
    monkeypatch.setattr(validate.Validate, "check", lambda self, *args: seen.append("numbers"))
    run()
    assert not seen
    torch._dynamo.reset()
    monkeypatch.setenv(debug.VARIABLE, "verify")
    run()
    assert set(seen) == {"metadata", "numbers"}


@pytest.mark.parametrize(
    ("options", "kinds"),
    [({}, [Verify]), ({"verify": True}, [Verify]), ({"dump": "folder"}, [Verify, DumpTo])],
)
def test_observers_follow_the_config(options: dict[str, Any], kinds: list[type]) -> None:
    config = Config(**options)
    watching = debug.observers(config, passes.quantizing(config))
    assert [type(observer) for observer in watching] == kinds
    assert watching[0].full is config.verify  # type: ignore[attr-defined]


def test_time_watches_without_a_copy_of_the_graph(capsys: pytest.CaptureFixture[str]) -> None:
    time = debug.Time()
    assert not time.compares
    passes.observing(Config()).run(captured(ReluMLP(), torch.randn(2, 16)).graph, [time])
    assert "qcompile: 00 canonicalize " in capsys.readouterr().err
