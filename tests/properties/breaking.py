"""Break a model folder at random, in the ways in which folders get broken, and worse."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

CONFIG, RECORD = "config.json", "qcompile.json"
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**12, 2**63, -(2**70), 0.5, 1e308, float("nan"), "", "x", "int8",
    "Linear", "re:(", "../..", "é" * 300, [], [None], ["Linear"], [1, [2]], {}, {"a": 1}, {"num_bits": 8}, "token",
    "static", "bfloat16",
)  # fmt: skip
Break = Callable[[Path, random.Random], str]


def weights(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def truncate(folder: Path, rng: random.Random) -> str:
    file = weights(folder, rng)
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])
    return "any"


def append(folder: Path, rng: random.Random) -> str:
    file = weights(folder, rng)
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randint(1, 64)))
    return "any"


def flip(folder: Path, rng: random.Random) -> str:
    """One bit anywhere; the digests see it."""
    file = weights(folder, rng)
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(data))
    return "any"


def flip_header(folder: Path, rng: random.Random) -> str:
    """A few bytes of the header, in a folder without digests."""
    (folder / RECORD).unlink(missing_ok=True)
    file = weights(folder, rng)
    data = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(end)] = rng.choice([rng.randrange(256), *b'0123456789",:[]{}FIBU'])
    file.write_bytes(bytes(data))
    return "any"


def new_header(folder: Path, rng: random.Random) -> str:
    file = weights(folder, rng)
    text = json.dumps({rng.choice(["a", "__metadata__", "model.norm.weight"]): rng.choice(VALUES)}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + rng.randbytes(rng.randrange(64)))
    return "any"


def edit_tensors(folder: Path, rng: random.Random) -> str:
    """Whole tensors gone, renamed, added, of another dtype or shape; a well-formed file without digests."""
    import torch

    (folder / RECORD).unlink(missing_ok=True)
    file = weights(folder, rng)
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kind = rng.randrange(6)
    if kind == 1:
        tensors[name + rng.choice("xyz")] = tensor
    elif kind == 2:
        tensors[name] = tensor.to(rng.choice([torch.int32, torch.uint8, torch.float8_e5m2, torch.bool, torch.float64]))
    elif kind == 3:
        tensors[name] = tensor.reshape(-1) if tensor.ndim > 1 else tensor.reshape(1, -1)
    elif kind == 4:
        tensors[name] = tensor[: max(0, len(tensor) - 1)].clone()
    elif kind == 5:
        tensors |= {name: tensor, f"{name}_extra": torch.zeros(3)}
    save_file(tensors or {"x": tensor}, file, {"format": "pt"})
    # A weight in float64 is the same weight.
    return "equal"


def edit_index(folder: Path, rng: random.Random) -> str:
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    mutate(values, rng)
    index.write_text(json.dumps(values))
    return "any"


def edit_config(folder: Path, rng: random.Random) -> str:
    values = json.loads((folder / CONFIG).read_text())
    quantization = values.pop("quantization_config")
    mutate(values, rng)
    values.setdefault("quantization_config", quantization)
    (folder / CONFIG).write_text(json.dumps(values))
    return "another model"


def edit_quantization(folder: Path, rng: random.Random) -> str:
    values = json.loads((folder / CONFIG).read_text())
    mutate(values["quantization_config"], rng)
    (folder / CONFIG).write_text(json.dumps(values))
    return "any"


def noise(folder: Path, rng: random.Random) -> str:
    """A few random bytes in a JSON file, of which config.json's may still be a config."""
    file = rng.choice(sorted(folder.glob("*.json")))
    data = bytearray(file.read_bytes())
    for _ in range(rng.randint(1, 6)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    file.write_bytes(bytes(data))
    return "another model"


def lose_a_file(folder: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(folder.iterdir()))
    file.unlink()
    kind = rng.randrange(4)
    if kind == 1:
        file.mkdir()
    elif kind == 2:
        file.write_bytes(b"")
    elif kind == 3:
        file.symlink_to(file.name)
    return "any"


def edit_record(folder: Path, rng: random.Random) -> str:
    values = json.loads((folder / RECORD).read_text())
    mutate(values, rng)
    (folder / RECORD).write_text(json.dumps(values))
    return "any"


def mutate(value: Any, rng: random.Random) -> None:
    """Change one entry somewhere in a JSON value."""
    while isinstance(value, dict | list) and value:
        key: Any = rng.choice(sorted(value)) if isinstance(value, dict) else rng.randrange(len(value))
        inner = value[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
            value = inner
            continue
        if rng.random() < 0.25:
            del value[key]
        else:
            value[key] = rng.choice(VALUES)
        return


BREAKS: tuple[Break, ...] = (
    truncate, append, flip, flip_header, new_header, edit_tensors, edit_index, edit_config, edit_config,
    edit_quantization, edit_quantization, noise, lose_a_file, edit_record,
)  # fmt: skip


def broken_copy(source: Path, target: Path, seed: int) -> tuple[str, str]:
    """A copy of a sharded folder with one to three things broken: what was done, and what may come of it.

    "any": an error, or the very same model. "equal": as any, up to rounding. "another model": an error, or whatever
    model the config now describes.
    """
    rng = random.Random(seed)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    names, outcomes = [], []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        one = rng.choice(BREAKS)
        try:
            outcomes.append(one(target, rng))
            names.append(one.__name__)
        except Exception:  # what it wanted to break is broken already
            continue
    if "flip" in names and not (target / RECORD).is_file():
        outcomes.append("another model")  # a flipped bit of a weight, and nothing left that could tell
    order = ("another model", "equal", "any")
    return " + ".join(names), next((outcome for outcome in order if outcome in outcomes), "any")
