"""qcompile tune: what it refuses, and what becomes of what the search finds."""

import pytest
import torch

from qcompile import cli


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tune needs shapes to measure"),
        (["--shape", "4096"], "a shape must be N,K"),
        (["--shape", "0,16"], "a shape must be N,K"),
        (["--shape", "a,b"], "a shape must be N,K"),
        (["--shape", "16,16", "--tokens", "0"], "argument --tokens: must be a whole number, at least 1"),
        (["--shape", "16,16", "--out", "no/such/folder/t.json"], "t.json cannot be written: No such file"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--shape", "4096,4096"]) == 2
    assert "this machine has none" in capsys.readouterr().err
