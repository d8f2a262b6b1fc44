"""`qcompile bisect`, as a user runs it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IDS, float_folder, tokenizer
from subjects import WINDOWS, perturbed, sabotaged, subject
from transformers import AutoModelForCausalLM

import qcompile
from qcompile import cli
from qcompile.bisection import bisect

SPOILED = "model.layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float folder, what was made of it with one scale spoiled, a spoiled calibration, a text."""
    place = tmp_path_factory.mktemp("bisect")
    float_folder(place / "f", subject())
    model = AutoModelForCausalLM.from_pretrained(place / "f", dtype=torch.float32).eval()
    stored = qcompile.quantize(model, [IDS, *WINDOWS.split(1)], activations="static")
    qcompile.save_pretrained(perturbed(stored, SPOILED, 100.0), place / "q", tokenizer=tokenizer())
    sabotaged(SPOILED).save(place / "spoiled.safetensors")
    return place


def run(place: Path, model: str, *options: str) -> int:
    text = ["--text", str(place / "text.txt"), "--seqlen", "24", "--windows", "2"]
    return cli.main(["bisect", str(place / model), *text, *options])


def test_a_float_model_and_its_calibration(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--calibration", str(place / "spoiled.safetensors"), "--activations", "static", "--alpha", "none"]
    assert run(place, "f", *options) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == f"{SPOILED}: 1 of 14 linears cost the accuracy"
    assert "after it (expected to change numbers)" in shown.out
    assert "variant" in shown.err
    assert "Traceback" not in shown.err


def test_a_quantized_folder_against_its_float_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, "q", "--against", str(place / "f"), "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [entry["linears"] for entry in found["culprits"]] == [[SPOILED]]
    assert found["step"] is None
    assert found["tokens"] == 2 * 23


def test_nothing_to_blame(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, "f", "--samples", "4", "--calibration", str(place / "text.txt"), "--threshold", "0.1") == 0
    assert capsys.readouterr().out.startswith("nothing costs the accuracy: the whole is at KL 0.0")


def test_chosen_passes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--calibration", str(place / "spoiled.safetensors"), "--threshold", "0", "--most", "4"]
    assert run(place, "f", *options, "--passes", "canonicalize,find_linears,quantize_linears", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"]["text"] in ("canonicalize", "find_linears", "quantize_linears")
    assert found["complete"] is False


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ("f", ["--against", "x"], "--against goes with a quantized model"),
        ("q", [], "is quantized; name the float model it was made from: --against FLOAT"),
        ("q", ["--against", "f", "--dtype", "fp8"], "--dtype is about quantizing"),
        ("nowhere", [], "nowhere"),
        ("f", ["--threshold", "-1"], "threshold must be a KL"),
        ("f", ["--passes", "canonicalize,frob"], "unknown pass 'frob'; the passes are canonicalize"),
        ("f", ["--alpha", "much"], "argument --alpha: must be a number in 0…1, auto, or none; got 'much'"),
        ("f", ["--calibration", "nothing.safetensors"], "no calibration file at nothing.safetensors"),
        ("f", ["--windows", "0"], "argument --windows: must be a whole number, at least 1"),
    ],
)
def test_mistakes(
    place: Path, model: str, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(place, model, *options) == 2
    error = capsys.readouterr().err.strip()
    assert reason in error.splitlines()[-1]
    assert "Traceback" not in error


def test_an_empty_text_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "empty.txt").write_text("", encoding="utf-8")
    assert cli.main(["bisect", str(place / "f"), "--text", str(place / "empty.txt")]) == 2
    assert "a text must have at least 64 tokens" in capsys.readouterr().err


def test_defaults_are_those_of_the_library() -> None:
    arguments = cli._parser().parse_args(["bisect", "MODEL"])
    assert (arguments.threshold, arguments.most) == (bisect.THRESHOLD, bisect.MOST)
