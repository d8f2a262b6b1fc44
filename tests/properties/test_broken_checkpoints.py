"""Broken folders: one line each, or the same model; never a traceback, a hang, or other numbers.

`make fuzz` runs many more: QCOMPILE_FUZZ says how many folders to break, QCOMPILE_FUZZ_SEED where to begin.
"""

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IDS, quantized
from properties.breaking import BREAKS, broken_copy

import qcompile
from qcompile.errors import QCompileError

COUNT = int(os.environ.get("QCOMPILE_FUZZ", "1000"))
FIRST = int(os.environ.get("QCOMPILE_FUZZ_SEED", "0"))
SECONDS, BYTES = 30, 12 * 2**30
CASES = [("compressed-tensors", "static"), ("lmdeploy", "token")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("whole")
    for format_, activations in CASES:
        model = quantized(activations=activations)
        qcompile.save_pretrained(model, place / format_, format=format_, shard_size=6000)  # type: ignore[arg-type]
    return {format_: place / format_ for format_, _ in CASES}


@pytest.fixture(scope="module")
def answers(folders: dict[str, Path]) -> dict[str, torch.Tensor]:
    return {name: answer(folder) for name, folder in folders.items()}


def answer(folder: Path) -> torch.Tensor:
    model = qcompile.from_pretrained(folder)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS % max(1, model.config.vocab_size), use_cache=False).logits
    return found


@pytest.fixture(autouse=True)
def limits() -> Any:
    """A folder that asks for the moon must not take this machine down, nor make the test wait."""

    def hang(*arguments: Any) -> None:
        pytest.fail(f"took more than {SECONDS} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, before[1]))
    handler = signal.signal(signal.SIGALRM, hang)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chunk", range(8))
def test_broken_folders(chunk: int, tmp_path: Path, folders: dict[str, Path], answers: dict[str, torch.Tensor]) -> None:
    refused = same = other = 0
    for seed in range(FIRST + chunk, FIRST + COUNT, 8):
        format_, _ = CASES[seed % 2]
        names, outcome = broken_copy(folders[format_], tmp_path / "broken", seed)
        signal.alarm(SECONDS)
        try:
            model = qcompile.from_pretrained(tmp_path / "broken")
        except QCompileError as error:
            text = str(error)
            if "\n" in text or len(text) > 900:
                pytest.fail(f"seed {seed}: {names}: one line, please: {text}")
            refused += 1
            continue
        finally:
            signal.alarm(0)
        if outcome == "another model":
            other += 1
            continue
        with torch.no_grad():
            logits = model(input_ids=IDS, use_cache=False).logits
        limit = 0 if outcome == "any" else 1e-5
        torch.testing.assert_close(logits, answers[format_], rtol=0, atol=limit, msg=f"seed {seed}: {names}")
        same += 1
    print(f"chunk {chunk}: {refused} refused, {same} the same model, {other} another model")
    assert refused > (same + other)


def test_there_is_a_kind_of_damage_for_every_file() -> None:
    assert len(set(BREAKS)) == 12
