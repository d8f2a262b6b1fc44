"""Several processes compute what one computes: int8 to the bit, fp8 within a bound; through torchrun as well."""

import functools
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import tokenizer
from processes import environment, free_port, together
from sharded import MODELS, logits, model, sharded_logits
from tolerances import assert_close
from torch import Tensor

import qcompile
from qcompile import cli

PROMPT = "the quick"
# Number of processes → models, and ways to compile each (None: eager PyTorch). Compiling for four takes long.
RUNS: dict[int, dict[str, list[str | None]]] = {
    2: {name: [None, "eager"] for name in MODELS},
    4: {"int8 token": [None, "eager"], "fp8 token": [None]},
}
RUNS[2]["int8 token"].append("inductor")
CASES = [
    pytest.param(size, name, inner, marks=[pytest.mark.inductor] if inner == "inductor" else [])
    for size, models in RUNS.items()
    for name, inners in models.items()
    for inner in inners
]
INT8, FP8 = ([case for case in CASES if case.values[1].startswith(kind)] for kind in ("int8", "fp8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model in a folder of its own."""
    path = tmp_path_factory.mktemp("models")
    for name in MODELS:
        qcompile.save_pretrained(model(name), path / name, tokenizer=tokenizer())
    return path


@functools.cache
def answers(folder: Path, size: int) -> list[dict[tuple[str, str | None], list[Tensor]]]:
    """Logits by model and way of compiling, of each process."""
    found = together(size, sharded_logits, str(folder), RUNS[size])
    assert all(isinstance(one, dict) for one in found), found
    return found


def alone(folder: Path, name: str, inner: str | None) -> list[Tensor]:
    return logits(qcompile.from_pretrained(folder / name), inner)


@pytest.mark.parametrize(("size", "name", "inner"), INT8)
def test_int8_logits_are_those_of_one_process(folder: Path, size: int, name: str, inner: str | None) -> None:
    expected = alone(folder, name, inner)
    for rank in answers(folder, size):
        assert all(map(torch.equal, rank[name, inner], expected))


@pytest.mark.filterwarnings("ignore:fp8 on CPU")
@pytest.mark.parametrize(("size", "name", "inner"), FP8)
def test_fp8_logits_are_close_and_alike_everywhere(folder: Path, size: int, name: str, inner: str | None) -> None:
    expected = alone(folder, name, inner)
    first, *others = (rank[name, inner] for rank in answers(folder, size))
    for actual, wanted in zip(first, expected, strict=True):
        assert_close("fp8/processes", actual=actual, expected=wanted)
    for other in others:
        assert all(map(torch.equal, other, first))


def command(folder: Path, *options: str) -> list[str]:
    small = ["--inner", "eager", "--max-length", "32", "--max-new-tokens", "8", "--prompt", "-"]
    return ["-m", "qcompile", "generate", str(folder), *small, *options]


def test_generate_under_torchrun_prints_the_text_of_one_process_once(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn tokens: the processes have to draw alike."""
    words = command(folder / "int8 token", "--temperature", "2", "--seed", "5")
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert cli.main(words[2:]) == 0
    whole = capsys.readouterr()
    assert len(whole.out.strip()) >= 8
    shared = subprocess.run(
        [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words],
        check=False, input=PROMPT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert shared.returncode == 0, shared.stderr
    assert (shared.stdout, shared.stderr) == (whole.out, whole.err)


def test_a_mistake_is_one_line_and_status_2_in_every_process(folder: Path) -> None:
    port = free_port()
    words = [sys.executable, "-P", *command(folder / "int8 token", "--top-p", "2")]
    started = [
        subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **environment(rank, 2, port)},
        )
        for rank in range(2)
    ]  # fmt: skip
    ended = [(one.communicate(timeout=120), one.returncode) for one in started]
    assert [status for _, status in ended] == [2, 2]
    assert sorted(said for said, _ in ended) == [
        ("", ""), ("", "qcompile: top-p must be above 0 and at most 1; got 2.0\n"),
    ]  # fmt: skip
