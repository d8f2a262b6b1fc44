"""Kill the writer of a model folder at random moments, and look at what it leaves. Run as a process of its own."""

import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from checkpoints import logits, quantized

import qcompile
from qcompile.errors import CheckpointError


def main(place: str, kills: int) -> None:
    """Print how often the output was there, was the old one, was not there; fail on anything in between."""
    torch.set_num_threads(1)
    rng = random.Random(0)
    old, new = quantized(), quantized(load=torch.float32, activations="static")
    answers = {"old": logits(old), "new": logits(new)}
    # Many small shards: most of the time goes into what a real model's time goes into.
    seconds = timed(new, Path(place) / "timing")
    counts = dict.fromkeys(("new", "old", "absent"), 0)
    for number in range(kills):
        folder = Path(place) / f"kill{number}"
        folder.mkdir()
        overwrite = bool(number % 2)
        if overwrite:
            qcompile.save_pretrained(old, folder / "out")
        child = forked(new, folder / "out", overwrite)
        time.sleep(rng.random() * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        counts[state(folder, answers, overwrite)] += 1
    print(counts)


def timed(model: Any, out: Path) -> float:
    """Seconds in which a child that is left alone writes, and half as many again: some kills must come too late."""
    save(model, out, overwrite=False)  # imports what children need
    seconds = []
    for number in range(9):
        written = out.with_name(f"{out.name}{number}")
        child, started = forked(model, written, overwrite=False), time.perf_counter()
        while not written.exists():
            assert time.perf_counter() - started < 60, "a child that is left alone must write"
            time.sleep(0.0005)
        seconds.append(time.perf_counter() - started)
        os.waitpid(child, 0)
    return 1.5 * statistics.median(seconds)


def forked(model: Any, out: Path, overwrite: bool) -> int:
    """A child process that writes; its number."""
    child = os.fork()
    if child == 0:
        save(model, out, overwrite)
        os._exit(0)
    return child


def save(model: Any, out: Path, overwrite: bool) -> None:
    qcompile.save_pretrained(model, out, overwrite=overwrite, shard_size=2000)


def state(folder: Path, answers: dict[str, torch.Tensor], overwrite: bool) -> str:
    """What a kill left in place of the output: "new" or "old", whole, or "absent"."""
    for leftover in folder.iterdir():
        if leftover.name != "out" and (leftover / "config.json").exists():
            assert which(leftover, answers) == "new"  # whole, and about to be renamed
        elif leftover.name.startswith(".out.partial-"):
            refused(leftover)
    if (folder / "out").exists():
        return which(folder / "out", answers)
    kept = list(folder.glob(".out.old-*/out"))
    assert bool(kept) == overwrite, list(folder.iterdir())
    for path in kept:  # between the two renames: the old one is whole, under another name
        assert which(path, answers) == "old"
    return "absent"


def which(path: Path, answers: dict[str, torch.Tensor]) -> str:
    found = logits(qcompile.from_pretrained(path))
    return next(name for name, expected in answers.items() if torch.equal(found, expected))


def refused(path: Path) -> None:
    from transformers import AutoModelForCausalLM

    try:
        qcompile.from_pretrained(path)
    except CheckpointError:
        pass
    else:
        raise AssertionError(f"{path} was loaded")
    try:
        AutoModelForCausalLM.from_pretrained(path)
    except (OSError, ValueError):
        return
    raise AssertionError(f"transformers loaded {path}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
