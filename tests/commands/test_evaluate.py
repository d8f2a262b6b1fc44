"""`qcompile evaluate`, as a user runs it."""

import json
from pathlib import Path

import pytest
from checkpoints import float_folder, quantized, tokenizer

import qcompile
from qcompile import cli


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("evaluate")
    qcompile.save_pretrained(quantized(), place / "q", tokenizer=tokenizer())
    return float_folder(place / "f"), place / "q"


def run(folders: tuple[Path, Path], *options: str) -> int:
    text = ["--text", str(folders[0].parent / "text.txt"), "--seqlen", "32", "--windows", "6", "--inner", "eager"]
    return cli.main(["evaluate", str(folders[1]), *text, *options])


def test_figures_and_their_windowing(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folders, "--against", str(folders[0]), "--batch-size", "2") == 0
    printed = capsys.readouterr().out
    assert "6 windows of 32, not overlapping, each from its own beginning" in printed
    assert "KL 0.0" in printed
    assert "top-1 agreement" in printed
    assert "SQNR" in printed
    assert "tokens/s, weights " in printed


def test_json(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folders, "--against", str(folders[0]), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 6 * 31
    assert len(found["against"]["sqnr"]) == 7
    assert found["against"]["top1"] > 0.8


def test_a_float_model_alone(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run((folders[0], folders[0]), "--json") == 0
    assert json.loads(capsys.readouterr().out)["against"] is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--batch-size", "0"], "argument --batch-size: must be a whole number, at least 1; got '0'"),
        (["--batch-size", "100"], "must fill one batch of 100 windows"),
        (["--against", "./nowhere"], "no such folder"),
        (["--text", "./nothing.txt"], "--text must be a file or a folder; there is no ./nothing.txt"),
        (["--field", "text"], "a field is for records; "),
    ],
)
def test_mistakes(
    folders: tuple[Path, Path], options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folders, *options) == 2
    error = capsys.readouterr().err.strip()
    assert reason in error.splitlines()[-1]


def test_the_float_model_to_compare_with_must_be_float(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folders, "--against", str(folders[1])) == 2
    assert "it is quantized already" in capsys.readouterr().err
