"""Files that the safetensors library reads back bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qcompile.checkpoint.folder import STORED_DTYPES
from qcompile.checkpoint.safetensors_writer import NAMES, split, write
from qcompile.errors import CheckpointError


def tensors() -> dict[str, torch.Tensor]:
    found = {}
    for dtype in NAMES:
        values = torch.arange(15).reshape(3, 5) % 2
        found[str(dtype)] = values.to(torch.float32).to(dtype)
    found["transposed"] = torch.randn(4, 6).t()
    found["part"] = torch.randn(9, 3)[2:5]
    found["scalar"] = torch.tensor(3.5)
    found["conjugate"] = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj()
    found["negative"] = found["conjugate"].imag
    found["empty"] = torch.empty(0, 4)
    return found


def test_everything_comes_back(tmp_path: Path) -> None:
    wanted = tensors()
    write(tmp_path / "a.safetensors", wanted, {"format": "pt"})
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(
            found[name].contiguous().reshape(-1).view(torch.uint8),
            tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8),
        ), name
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_name_is_safetensors_own() -> None:
    from safetensors.torch import _TYPES

    assert _TYPES.items() <= STORED_DTYPES.items()


def test_a_dtype_that_the_format_lacks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"safetensors has no torch.complex128; x is of it; convert it"):
        write(tmp_path / "a.safetensors", {"x": torch.zeros(2, dtype=torch.complex128)}, {})


def test_large_tensors_go_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.checkpoint.safetensors_writer.BLOCK", 7)
    wanted = {"w": torch.randn(11, 3)}
    write(tmp_path / "a.safetensors", wanted, {})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["w"], wanted["w"])


def test_shards_keep_order_and_size() -> None:
    sizes = {"a": 10, "b": 10, "c": 30, "d": 1, "e": 1}
    wanted = {name: torch.zeros(size, dtype=torch.int8) for name, size in sizes.items()}
    assert split(wanted, 20) == [["a", "b"], ["c"], ["d", "e"]]
    assert split(wanted, 100) == [list(sizes)]
