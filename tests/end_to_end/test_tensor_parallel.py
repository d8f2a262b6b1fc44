"""Several processes compute what one computes: int8 to the bit, fp8 within a bound; through torchrun as well."""

import functools
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

INT8 = [name for name in MODELS if name.startswith("int8")]
FP8 = [name for name in MODELS if name.startswith("fp8")]
SIZES = [2, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model in a folder of its own."""
    path = tmp_path_factory.mktemp("models")
    for name in MODELS:
        qcompile.save_pretrained(model(name), path / name, tokenizer=tokenizer())
    return path


@functools.cache
def answers(folder: Path, size: int, *inners: str | None) -> list[dict[tuple[str, str | None], list[Tensor]]]:
    """Logits by model and way of compiling, of each process."""
    names = INT8[:1] if "inductor" in inners else MODELS
    found = together(size, sharded_logits, str(folder), {name: list(inners) for name in names})
    assert all(isinstance(one, dict) for one in found), found
    return found


def alone(folder: Path, name: str, inner: str | None) -> list[Tensor]:
    return logits(qcompile.from_pretrained(folder / name), inner)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("inner", [None, "eager"])
@pytest.mark.parametrize("name", INT8)
def test_int8_logits_are_those_of_one_process(folder: Path, name: str, inner: str | None, size: int) -> None:
    expected = alone(folder, name, inner)
    for rank in answers(folder, size, None, "eager"):
        for actual, wanted in zip(rank[name, inner], expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.inductor
def test_int8_logits_are_those_of_one_process_with_inductor(folder: Path) -> None:
    expected = alone(folder, INT8[0], "inductor")
    for rank in answers(folder, 2, "inductor"):
        for actual, wanted in zip(rank[INT8[0], "inductor"], expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.filterwarnings("ignore:fp8 on CPU")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("inner", [None, "eager"])
@pytest.mark.parametrize("name", FP8)
def test_fp8_logits_are_close_and_alike_everywhere(folder: Path, name: str, inner: str | None, size: int) -> None:
    expected = alone(folder, name, inner)
    first, *others = (rank[name, inner] for rank in answers(folder, size, None, "eager"))
    for actual, wanted in zip(first, expected, strict=True):
        assert_close("fp8/processes", actual=actual, expected=wanted)
    for other in others:
        assert all(map(torch.equal, other, first))


def command(folder: Path, *options: str) -> list[str]:
    small = ["--inner", "eager", "--max-length", "32", "--max-new-tokens", "8", "--prompt", "-"]
    return ["-m", "qcompile", "generate", str(folder), *small, *options]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", *words], check=False, input="the quick", capture_output=True, text=True, timeout=240,
        env={**environment_here(), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def environment_here() -> dict[str, str]:
    import os

    return dict(os.environ)


@pytest.mark.parametrize(
    ("size", "options"), [(2, ()), (4, ()), (2, ("--temperature", "2", "--seed", "5"))], ids=["2", "4", "2, drawn"]
)
def test_generate_under_torchrun_prints_the_text_of_one_process_once(
    folder: Path, size: int, options: tuple[str, ...]
) -> None:
    words = command(folder / INT8[0], *options)
    whole = run(words)
    shared = run(["-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port", "0", *words])
    assert (whole.returncode, shared.returncode) == (0, 0), shared.stderr
    assert len(whole.stdout.strip()) >= 8
    assert shared.stdout == whole.stdout
    assert shared.stderr == whole.stderr == "qcompile: compiling …\n"


def test_a_mistake_is_one_line_and_status_2_in_every_process(folder: Path) -> None:
    port = free_port()
    words = [sys.executable, "-P", *command(folder / INT8[0], "--top-p", "2")]
    started = [
        subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment_here(), **environment(rank, 2, port)},
        )
        for rank in range(2)
    ]  # fmt: skip
    ended = [(one.communicate(timeout=120), one.returncode) for one in started]
    assert [status for _, status in ended] == [2, 2]
    assert sorted(said for said, _ in ended) == [
        ("", ""), ("", "qcompile: top-p must be above 0 and at most 1; got 2.0\n"),
    ]  # fmt: skip
