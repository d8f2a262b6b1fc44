"""Write safetensors files tensor by tensor, so that a shard needs no second copy in memory, and safely to disk.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian length of a JSON header, the header, then
the tensors' bytes one after the other, as the header's offsets say.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from qcompile.checkpoint.folder import STORED_DTYPES
from qcompile.errors import CheckpointError

NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
ALIGNMENT = 8
BLOCK = 2**24


def split(tensors: Mapping[str, Tensor], most: int) -> list[list[str]]:
    """Names in shards of at most `most` bytes (a larger tensor has one for itself), in order."""
    shards: list[list[str]] = []
    size = most + 1
    for name, tensor in tensors.items():
        if size + tensor.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one file and have it on disk when this returns.

    Raises OSError, and CheckpointError for a dtype that the format lacks.
    """
    # Wide types first: every tensor then begins at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in ordered:
        if tensor.dtype not in NAMES:
            raise CheckpointError(f"safetensors has no {tensor.dtype}; {name} is of it; convert it to another dtype")
        end = offset + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            for block in _bytes(tensor):
                file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _bytes(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    for block in torch.split(flat, BLOCK):
        yield block.cpu().numpy().data
