"""Options' types, and what the parser says."""

import argparse

import pytest
import torch

from qcompile import cli
from qcompile.commands.arguments import DTYPES, SEED, Parser, filled, migration_strength, utf8, whole
from qcompile.errors import ConfigError
from qcompile.ops import TORCH_DTYPES


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("64", 64), ("0064", 64)])
def test_whole_numbers(text: str, value: int) -> None:
    assert whole(1, 64)(text) == value


@pytest.mark.parametrize("text", ["0", "65", "-1", "1.5", "", "one", "9" * 5000])
def test_other_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"^must be a whole number, in 1…64; got '.{0,40}'$"):
        whole(1, 64)(text)
    with pytest.raises(argparse.ArgumentTypeError, match="whole number, at least 99; got "):
        whole(99)(text if text != "9" * 5000 else "9" * 30)


def test_seeds_are_those_of_torch() -> None:
    for seed in SEED:
        torch.manual_seed(whole(*SEED)(str(seed)))
    with pytest.raises(argparse.ArgumentTypeError):
        whole(*SEED)(str(SEED[1] + 1))


def test_dtypes_are_those_of_the_library() -> None:
    assert tuple(TORCH_DTYPES) == DTYPES


def test_alpha_as_words() -> None:
    assert [migration_strength(text) for text in ("0.7", "auto", "none")] == [0.7, "auto", None]
    with pytest.raises(argparse.ArgumentTypeError, match=r"^must be a number in 0…1, auto, or none; got 'much'$"):
        migration_strength("much")


def test_text_is_utf8() -> None:
    assert utf8("α\n") == "α\n"
    with pytest.raises(argparse.ArgumentTypeError, match=r"^must be text in UTF-8; got '\\udcff'$"):
        utf8("a\udcff")
    assert filled("α") == "α"
    with pytest.raises(argparse.ArgumentTypeError, match=r"^must be a text of at least one character; it is empty$"):
        filled("")


def test_a_complaint_is_one_line() -> None:
    parser = Parser(prog="qcompile")
    parser.add_argument("--count", type=whole(1))
    message = "argument --count: must be a whole number, at least 1; got '0'; see qcompile --help"
    with pytest.raises(ConfigError, match=f"^{message}$"):
        parser.parse_args(["--count", "0"])


COMMANDS = [
    ["demo", "--windows", "0"],
    ["bench", "m", "--rounds", "1"],
    ["bench", "m", "--threads", "-1"],
    ["tune", "--tokens", "1", "0"],
    ["serve", "m", "--port", "65536"],
    ["serve", "m", "--max-batch", "0"],
    ["serve", "m", "--threads", "0"],
    ["serve", "m", "--model-name", "a\udcff"],
    ["quantize", "m", "--out", "o", "--batch-size", "0"],
    ["quantize", "m", "--out", "o", "--quality", "-1"],
    ["quantize", "m", "--out", "o", "--seed", str(2**64)],
    ["evaluate", "m", "--batch-size", "0"],
    ["report", "m", "--windows", "0"],
    ["bisect", "m", "--most", "0"],
    ["generate", "m", "--prompt", "a", "--max-new-tokens", "0"],
    ["generate", "m", "--prompt", "a", "--seed", "9" * 30],
    ["generate", "m", "--prompt", "a\udcff"],
    ["generate", "m", "--prompt", "a", "--stop", "b", "a\udcff"],
    ["generate", "m"],
    ["evaluate", "m", "--frobnicate"],
    ["frobnicate"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_what_cannot_be_meant_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("qcompile: ")
    assert error.count("\n") == 1
    assert error.endswith(" --help\n")
