"""A model folder before anything is loaded from it: does it hold what it says it holds?

Only config.json, the index and the headers of safetensors files are read. Pickle files are never opened.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qcompile.errors import CheckpointError

CONFIG, RECORD = "config.json", "qcompile.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
LAYERS = re.compile(r"n(um)?_(\w+_)?(layer|block)s?|(en|de)coder_layers|depth")
LARGEST_JSON = 64 * 2**20
# By the names that safetensors has for them.
STORED_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a file: dtype (None for one that torch or we do not know) and shape."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Folder:
    """config: what config.json holds. tensors: by name, over all files. record: what qcompile.json holds, if it is
    there."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    files: tuple[Path, ...]
    record: Mapping[str, Any]

    @property
    def quantization_config(self) -> Any:
        """As config.json has it; None for a float model."""
        text = self.config.get("text_config")
        nested = text.get("quantization_config") if isinstance(text, dict) else None
        return self.config.get("quantization_config", nested)


def inspect(path: Path, *, checksums: bool = True) -> Folder:
    """Read what a folder says of itself. Raises CheckpointError if it contradicts itself or is not whole.

    checksums: also compare the weight files with the digests in qcompile.json, if the folder has one.
    """
    if not path.is_dir():
        raise CheckpointError(f"MODEL must be a folder, or a hub name; got {path}: no such folder")
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"a model folder must hold config.json; {path} has none; it is no model, or half written")
    config = read_json(path / CONFIG)
    if config.get("transformers_weights") is not None:
        raise CheckpointError(
            f"weights must be in the usual files; config.json of {path} names others: remove its transformers_weights"
        )
    record = read_json(path / RECORD) if (path / RECORD).is_file() else {}
    files = _weight_files(path)
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in _header(file).items():
            if name in tensors:
                raise CheckpointError(f"each tensor must be stored once; {file.name} repeats {name}; write it again")
            tensors[name] = stored
    if (path / INDEX).is_file():
        _check_index(path, set(tensors))
    _check_layers(config, len(tensors))
    if checksums:
        _check_digests(path, files, record)
    return Folder(path, config, tensors, files, record)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{path} must be a small JSON file; it has {path.stat().st_size} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} must be readable JSON: {reason}; get the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object; got {type(value).__name__}; get the file again")
    return value


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weight_files(path: Path) -> tuple[Path, ...]:
    if (path / INDEX).is_file():
        listed = read_json(path / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
            raise CheckpointError(f"{path / INDEX} must map tensors to files; it has no weight_map; write it again")
        names = sorted(set(listed.values()))
        if (path / WEIGHTS).is_file() and WEIGHTS not in names:
            raise CheckpointError(
                f"weights must be in one place; {path} has {INDEX} and beside it {WEIGHTS}, which it does not list; "
                "delete one of them"
            )
        for name in names:
            if Path(name).name != name or not os.path.isfile(path / name):
                raise CheckpointError(f"every file of the index must be in the folder; {name} is not; get it again")
        return tuple(path / name for name in names)
    if (path / WEIGHTS).is_file():
        return (path / WEIGHTS,)
    pickles = [file.name for pattern in PICKLES for file in path.glob(pattern)]
    if pickles:
        raise CheckpointError(
            f"weights must be safetensors; {path} has pickle files ({pickles[0]}), which can run code when they are "
            "opened; convert them with a tool you trust"
        )
    raise CheckpointError(f"a model folder must hold {WEIGHTS}; {path} has no weights; get the files again")


def _header(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Stored(STORED_DTYPES.get(part.get_dtype()), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (OSError, SafetensorError, ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} must be a whole safetensors file: {reason}; get the file again") from None


def _check_index(path: Path, found: set[str]) -> None:
    listed = set(read_json(path / INDEX)["weight_map"])
    if listed != found:
        name = next(iter(listed ^ found))
        where = "index" if name in listed else "files"
        raise CheckpointError(
            f"index and files must hold the same tensors; {name} is in the {where} only; write it again"
        )


def _check_layers(config: Mapping[str, Any], tensors: int) -> None:
    """A config that asks for more layers than there are tensors would have them all built before that shows."""
    for key, value in _numbers(config):
        if LAYERS.fullmatch(key) and value > tensors:
            raise CheckpointError(
                f"{CONFIG} must fit the weights; {key} is {value}, there are {tensors} tensors in all"
            )


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, value


def _check_digests(path: Path, files: tuple[Path, ...], record: Mapping[str, Any]) -> None:
    if not (path / RECORD).exists():
        return
    known = record.get("sha256")
    if not isinstance(known, dict):
        raise CheckpointError(f"{path / RECORD} must map files to digests; get it again, or delete it to load without")
    for file in files:
        if known.get(file.name) != digest(file):
            raise CheckpointError(
                f"{file} must be the file that was written; its SHA-256 is not the one in {RECORD}; get the file "
                f"again, or delete {RECORD} if you changed it on purpose"
            )
