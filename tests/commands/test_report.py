"""`qcompile report`, as a user runs it."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import networkx
import pytest
from checkpoints import float_folder, quantized, tokenizer

import qcompile
from qcompile import cli


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report")
    float_folder(place / "f")
    qcompile.save_pretrained(quantized(), place / "q", tokenizer=tokenizer())
    (place / "bare").mkdir()
    (place / "bare" / "config.json").write_bytes((place / "f" / "config.json").read_bytes())
    return place


def data_of(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    data: dict[str, Any] = json.loads(found)
    return data


def test_a_float_folder_with_everything(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = str(folders / "text.txt"), tmp_path / "r.html"
    graph = ["--dot", str(tmp_path / "g.dot"), "--graphml", str(tmp_path / "g.graphml")]
    options = ["--calibration", text, "--text", text, "--seqlen", "32", "--samples", "4", "--windows", "2"]
    assert cli.main(["report", str(folders / "f"), "--out", str(out), *options, *graph]) == 0
    assert "8 linears in 1 graphs, calibrated on" in capsys.readouterr().out
    data = data_of(out)
    assert data["title"] == "f"
    assert dict(data["quality"])["tokens scored"] == 62
    assert dict(data["summary"])["calibrated on"] == "128 tokens in 4 batches"
    assert len(data["channels"]) == 7
    assert len(networkx.read_graphml(tmp_path / "g.graphml")) == len(data["graphs"][0]["texts"][-1])
    assert (tmp_path / "g.dot").read_text().startswith("digraph {")


def test_a_config_alone(folders: Path, tmp_path: Path) -> None:
    assert cli.main(["report", str(folders / "bare"), "--out", str(tmp_path / "r.html"), "--target", "sm90"]) == 0
    data = data_of(tmp_path / "r.html")
    assert "no weights were read" in data["notes"][0]
    assert dict(data["summary"])["target"] == "cuda (sm90)"


def test_weights_can_be_left_unread(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--no-weights", "--calibration", "x.txt", "--alpha", "none", "--text", str(folders / "text.txt")]
    assert cli.main(["report", str(folders / "f"), "--out", str(tmp_path / "r.html"), *options]) == 0
    notes = data_of(tmp_path / "r.html")["notes"]
    assert "the calibration text was not read" in notes[0]
    assert notes[1] == "the text to measure quality on was not read: there are no weights"
    assert "no weights were read" in notes[2]
    assert capsys.readouterr().err.splitlines() == [f"qcompile: {note}" for note in notes[:2]]


def test_a_quantized_folder_without_its_weights(folders: Path, tmp_path: Path) -> None:
    options = ["--no-weights", "--out", str(tmp_path / "r.html")]
    assert cli.main(["report", str(folders / "q"), *options]) == 0
    data = data_of(tmp_path / "r.html")
    assert sorted(entry["fate"] for entry in data["linears"]) == ["float", *["stored"] * 7]
    assert dict(data["summary"])["scheme"] == data["scheme"] == "int8, per token"
    assert {step["check"] for step in data["graphs"][0]["passes"]} == {None}


def test_a_quantized_folder_against_its_float_model(folders: Path, tmp_path: Path) -> None:
    options = ["--against", str(folders / "f"), "--text", str(folders / "text.txt"), "--seqlen", "32", "--windows", "2"]
    assert cli.main(["report", str(folders / "q"), "--out", str(tmp_path / "r.html"), *options]) == 0
    data = data_of(tmp_path / "r.html")
    assert dict(data["quality"])["top-1 agreement"] > 0.8
    assert sum(entry["sqnr"] is not None for entry in data["linears"]) == 7


def test_the_graphs_need_not_run(folders: Path, tmp_path: Path) -> None:
    assert cli.main(["report", str(folders / "f"), "--out", str(tmp_path / "r.html"), "--no-validate"]) == 0
    data = data_of(tmp_path / "r.html")
    assert {step["check"] for step in data["graphs"][0]["passes"]} == {None}
    assert data["channels"] == {}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--alpha", "much"], "argument --alpha: must be a number"),
        (["--windows", "0"], "argument --windows: must be a whole number, at least 1"),
        (["--calibration", "./nothing.txt"], "there is no ./nothing.txt"),
        (["--bench", "none.json"], "the bench file must be readable"),
        (["--against", "f"], "against is for a quantized model"),
        (["--text", "nothing"], "--text must be a file or a folder; there is no nothing"),
    ],
)
def test_mistakes(folders: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(folders / "f"), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert reason in error.splitlines()[-1]
    assert "Traceback" not in error


@pytest.mark.parametrize("option", [["--dtype", "fp8"], ["--activations", "static"], ["--alpha", "none"], ["--ignore"]])
def test_a_quantized_folder_has_its_scheme(
    folders: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("report", "explain") if option[0] != "--alpha" else ("report",):
        assert cli.main([command, str(folders / "q"), *option]) == 2
        assert f"{option[0]} is about quantizing; " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--dot", "--graphml"])
def test_a_place_that_cannot_be_written_is_known_at_once(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "no-such-model", option, "nowhere/r"]) == 2
    error = capsys.readouterr().err
    assert error == "qcompile: nowhere/r cannot be written: No such file or directory; choose another place\n"


def test_a_missing_extra_is_known_at_once(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jinja2" else find(name))
    assert cli.main(["report", str(folders / "nowhere")]) == 2
    printed = capsys.readouterr().err
    assert printed == 'qcompile: a report needs jinja2; install it: pip install "qcompile[report]"\n'
