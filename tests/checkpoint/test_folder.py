"""A folder is looked at before anything is loaded from it; every contradiction has its sentence."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import edit_json, llama
from safetensors.torch import load_file, save_file

from qcompile.checkpoint.folder import CONFIG, INDEX, WEIGHTS, digest, inspect, read_json
from qcompile.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "m", max_shard_size="10KB")
    return tmp_path / "m"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "s")
    return tmp_path / "s"


def test_a_whole_folder_says_what_it_holds(folder: Path) -> None:
    found = inspect(folder)
    assert len(found.files) > 1
    assert found.tensors["model.norm.weight"].shape == (32,)
    assert found.tensors["model.norm.weight"].dtype == torch.float32
    assert found.config["model_type"] == "llama"
    assert found.quantization_config is None


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def truncate(folder: Path) -> None:
    data = first_shard(folder).read_bytes()
    first_shard(folder).write_bytes(data[:-10])


def garble(folder: Path) -> None:
    data = bytearray(first_shard(folder).read_bytes())
    data[8:20] = b"x" * 12
    first_shard(folder).write_bytes(bytes(data))


def empty(folder: Path) -> None:
    first_shard(folder).write_bytes(b"")


def lose_a_shard(folder: Path) -> None:
    first_shard(folder).unlink()


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(first_shard(folder))
    tensors.pop(next(iter(tensors)))
    save_file(tensors or {"x": torch.zeros(1)}, first_shard(folder))


def repeat_a_tensor(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second)


def leave_the_folder(folder: Path) -> None:
    index = read_json(folder / INDEX)
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../m/model.safetensors")
    (folder / INDEX).write_text(json.dumps(index))


def too_many_layers(folder: Path) -> None:
    edit_json(folder / CONFIG, num_hidden_layers=10**9)


BROKEN: dict[Callable[[Path], None], str] = {
    truncate: "must be a whole safetensors file",
    garble: "must be a whole safetensors file",
    empty: "must be a whole safetensors file",
    lose_a_shard: "every file of the index must be in the folder",
    lose_a_tensor: "index and files must hold the same tensors",
    repeat_a_tensor: "each tensor must be stored once",
    leave_the_folder: "every file of the index must be in the folder",
    too_many_layers: "num_hidden_layers is 1000000000",
    lambda f: (f / CONFIG).unlink(): "must hold config.json",
    lambda f: (f / CONFIG).write_text("{"): "must be readable JSON",  # type: ignore[dict-item, return-value]
    lambda f: (f / CONFIG).write_text("[" * 100_000): "must be readable JSON",  # type: ignore[dict-item, return-value]
    lambda f: (f / CONFIG).write_text("[1]"): "must hold a JSON object",  # type: ignore[dict-item, return-value]
    lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"): "must be readable JSON",  # type: ignore[dict-item, return-value]
    lambda f: (f / INDEX).write_text("{}"): "no weight_map",  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_every_contradiction_has_its_sentence(folder: Path, number: int) -> None:
    edit, reason = list(BROKEN.items())[number]
    edit(folder)
    with pytest.raises(CheckpointError, match=reason) as caught:
        inspect(folder)
    assert "\n" not in str(caught.value)


def test_no_folder_and_no_weights(tmp_path: Path, single: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        inspect(tmp_path / "nowhere")
    (single / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"must hold model\.safetensors"):
        inspect(single)


def test_pickles_are_never_opened(single: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return pytest.fail, ("a pickle was opened",)

    (single / WEIGHTS).unlink()
    (single / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"pickle files \(pytorch_model\.bin\)"):
        inspect(single)


def test_digests_show_every_flipped_bit(single: Path) -> None:
    (single / "qcompile.json").write_text(json.dumps({"sha256": {WEIGHTS: digest(single / WEIGHTS)}}))
    inspect(single)
    data = bytearray((single / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (single / WEIGHTS).write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="its SHA-256 is not the one"):
        inspect(single)
    inspect(single, checksums=False)
    (single / "qcompile.json").write_text(json.dumps({"sha256": [1]}))
    with pytest.raises(CheckpointError, match="must map files to digests"):
        inspect(single)


def test_what_is_checked_is_what_is_loaded(folder: Path, single: Path) -> None:
    """transformers prefers model.safetensors to an index, and whatever config.json names to both."""
    (folder / WEIGHTS).write_bytes((single / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match=r"beside it model\.safetensors, which it does not list"):
        inspect(folder)
    edit_json(single / CONFIG, transformers_weights="other.safetensors")
    with pytest.raises(CheckpointError, match="remove its transformers_weights"):
        inspect(single)
