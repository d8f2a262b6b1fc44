"""Calibration files are whole or absent, and statistics meet only the weights they were taken from."""

import contextlib
import copy
import dataclasses
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from qcompile import calibration as calibration_module
from qcompile.calibration import (
    FORMAT,
    Calibration,
    Statistic,
    count_tokens,
    keyword_arguments,
    sample,
    summary,
    version_of,
)
from qcompile.errors import CalibrationError


def weights(count: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {f"model.layers.{i}.fc.weight": torch.randn(24, 16, dtype=dtype) for i in range(count)}


def calibration(of: dict[str, Tensor]) -> Calibration:
    statistics = {
        name: Statistic(rows[0], rows, sample(weight))
        for i, (name, weight) in enumerate(of.items())
        if (rows := torch.full((2, weight.shape[1]), float(i + 1))) is not None
    }
    return Calibration(statistics, 3, 17, {"input_ids": torch.arange(4)[None]})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = calibration(weights())
    saved.save(tmp_path / "file")
    loaded = Calibration.load(tmp_path / "file")
    assert (loaded.batches, loaded.tokens) == (3, 17)
    assert torch.equal(loaded.example["input_ids"], saved.example["input_ids"])
    assert loaded.statistics.keys() == saved.statistics.keys()
    for name, statistic in saved.statistics.items():
        for field in dataclasses.fields(Statistic):
            assert torch.equal(getattr(loaded.statistics[name], field.name), getattr(statistic, field.name))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_tensors_that_are_views_are_saved(tmp_path: Path) -> None:
    shared = torch.rand(2, 16)
    statistics = {
        "a.weight": Statistic(shared[0], shared[:1], shared[1, ::2]),
        "b.weight": Statistic(shared[0], shared, shared[1]),
    }
    Calibration(statistics, 1, 1).save(tmp_path / "file")
    assert torch.equal(Calibration.load(tmp_path / "file").statistics["b.weight"].absmax, shared[0])


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file can have more than 256 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_save_leaves_no_file(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(CalibrationError, match="^.*file cannot be written: File too large; choose"):
        calibration(weights()).save(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    first = calibration(weights())
    first.save(tmp_path / "file")
    with full_disk(), pytest.raises(CalibrationError, match="^.*file cannot be written: File too large; choose"):
        calibration(weights(1)).save(tmp_path / "file")
    assert Calibration.load(tmp_path / "file").statistics.keys() == first.statistics.keys()


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    file = tmp_path / "file"
    calibration(weights()).save(file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CalibrationError, match="is no readable safetensors file") as caught:
        Calibration.load(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=f"no calibration file at {tmp_path / 'file'}; make one with"):
        Calibration.load(tmp_path / "file")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="is no readable safetensors file"):
        Calibration.load(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "qcompile-calibration-0"}])
def test_a_foreign_file_is_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    safetensors.torch.save_file({"model.weight": torch.zeros(2)}, tmp_path / "file", metadata)
    with pytest.raises(CalibrationError, match="is no calibration file") as caught:
        Calibration.load(tmp_path / "file")
    assert repr((metadata or {}).get("format")) in str(caught.value)
    assert FORMAT in str(caught.value)


@pytest.mark.parametrize("keys", [(), ("absmax/a",), ("sample/a",)])
def test_incomplete_statistics_are_refused(keys: tuple[str, ...], tmp_path: Path) -> None:
    metadata = {"format": FORMAT, "plain": '{"batches": 1, "tokens": 1, "example": {}, "kinds": 1}'}
    safetensors.torch.save_file({key: torch.zeros(2) for key in keys}, tmp_path / "file", metadata)
    with pytest.raises(CalibrationError, match="holds no complete statistics"):
        Calibration.load(tmp_path / "file")


def test_statistics_are_found_by_name() -> None:
    of = weights()
    found = calibration(of)
    for i, (name, weight) in enumerate(of.items()):
        assert found.statistic(weight, name, "absmax")[0] == i + 1


@pytest.mark.parametrize("rename", ["{}", "wrapped.{}", "another.name.weight", "fc.weight"])
def test_statistics_are_found_by_content_under_another_name(rename: str) -> None:
    of = weights(3)
    found = calibration(of)
    for i, (name, weight) in enumerate(of.items()):
        assert found.statistic(weight, rename.format(name), "absmax")[0] == i + 1


def test_a_wrappers_prefix_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight is read once, and compared with the one statistic whose name fits."""
    of = weights(10)
    found = calibration(of)
    done: list[str] = []
    sampled, compared = calibration_module.sample, torch.allclose
    monkeypatch.setattr(calibration_module, "sample", lambda weight: [done.append("sampled"), sampled(weight)][1])
    monkeypatch.setattr(torch, "allclose", lambda *args, **rest: [done.append("compared"), compared(*args, **rest)][1])
    for name, weight in of.items():
        found.statistic(weight, f"wrapped.{name}", "absmax")
    assert done == ["sampled", "compared"] * 10


def test_equal_weights_are_told_apart_by_name() -> None:
    of = weights()
    first, second = of
    of[second] = of[first].clone()
    found = calibration(of)
    assert found.statistic(of[second], second, "absmax")[0] == 2
    assert found.statistic(of[second], f"wrapped.{second}", "absmax")[0] == 2
    with pytest.raises(CalibrationError, match="has several weights that look like this one, and none of its name"):
        found.statistic(of[second], "another.name.weight", "absmax")


def test_exchanged_weights_take_their_statistics_along() -> None:
    of = weights()
    first, second = of
    found = calibration(of)
    assert found.statistic(of[second], first, "absmax")[0] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_precision_of_the_model_is_the_same_model(dtype: torch.dtype) -> None:
    of = weights()
    found = calibration(of)
    for i, (name, weight) in enumerate(of.items()):
        assert found.statistic(weight.to(dtype), name, "absmax")[0] == i + 1
        assert found.statistic(weight.to(dtype), "another.name.weight", "absmax")[0] == i + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: torch.randn_like(weight),
        lambda weight: weight * 1.05,
        lambda weight: -weight,
        lambda weight: weight.T,
        lambda weight: weight[:, :8],
        lambda weight: torch.zeros_like(weight),
        lambda weight: torch.full_like(weight, torch.nan),
    ],
    ids=["random", "scaled", "negated", "transposed", "cut", "zeros", "nan"],
)
def test_another_model_is_refused(change: Any) -> None:
    of = weights()
    name, weight = next(iter(of.items()))
    with pytest.raises(CalibrationError, match=f"for {name} it was recorded on other weights"):
        calibration(of).statistic(change(weight), name, "absmax")


def test_an_unknown_weight_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"for lm_head\.weight it has no such weight; calibrate this model"):
        calibration(weights()).statistic(torch.randn(24, 16), "lm_head.weight", "absmax")


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 1), (100, 37)], ids=str)
def test_a_sample_is_64_values_and_every_columns_absmax(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.bfloat16)
    values = sample(weight)
    assert values.dtype == torch.float32
    assert values.numel() == min(64, weight.numel()) + shape[1]
    assert values[0] == weight[0, 0]
    assert torch.equal(values[-shape[1] :], weight.abs().amax(0).float())


def test_one_scaled_column_is_another_weight() -> None:
    of = {"fc.weight": torch.randn(24, 512)}
    known = calibration(of)
    of["fc.weight"][:, 100] *= 4
    with pytest.raises(CalibrationError, match="recorded on other weights"):
        known.statistic(of["fc.weight"], "fc.weight", "absmax")


@pytest.mark.parametrize("plain", [None, "{", "[]", '{"batches": 1}', '{"batches": 1, "tokens": 1, "alien": 2}'])
def test_a_damaged_header_is_refused(plain: str | None, tmp_path: Path) -> None:
    tensors = {f"{field.name}/a": torch.zeros(2) for field in dataclasses.fields(Statistic)}
    metadata = {"format": FORMAT} | ({"plain": plain} if plain is not None else {})
    safetensors.torch.save_file(tensors, tmp_path / "file", metadata)
    with pytest.raises(CalibrationError, match="record it again"):
        Calibration.load(tmp_path / "file")


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="none/file cannot be written: No such file or directory; choose"):
        calibration(weights()).save(tmp_path / "none" / "file")


def test_a_sample_reaches_most_channels() -> None:
    weight = torch.arange(128.0).expand(256, 128)
    assert sample(weight).unique().numel() > 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sample_does_not_follow_the_weight(dtype: torch.dtype) -> None:
    weight = torch.ones(4, 4, dtype=dtype)
    values = sample(weight)
    weight.zero_()
    assert values.tolist() == [1] * 20


def test_a_deep_copy_is_the_same_object() -> None:
    one = calibration(weights())
    assert copy.deepcopy(one) is one


def test_summary_is_one_json_line() -> None:
    text = summary(calibration(weights()))
    assert "\n" not in text
    assert json.loads(text) == {"weights": 2, "batches": 3, "tokens": 17}


def test_versions_count_writes() -> None:
    tensor = torch.zeros(3)
    before = version_of(tensor)
    tensor.add_(1)
    assert version_of(tensor) == before + 1
    with torch.inference_mode():
        assert version_of(torch.zeros(3)) == -1


def test_batches_become_keyword_arguments() -> None:
    model, ids = nn.Identity(), torch.tensor([[1, 2]])
    assert keyword_arguments(model, ids) == {"input_ids": ids}
    assert keyword_arguments(model, {"x": 1, "y": 2}) == {"x": 1, "y": 2}
    assert torch.equal(keyword_arguments(model, [1, 2])["input_ids"], ids)


@pytest.mark.parametrize("batch", ["text", 3, None, [], [[1, 2]], [1.5]], ids=repr)
def test_other_batches_are_refused(batch: object) -> None:
    with pytest.raises(CalibrationError, match=f"got {type(batch).__name__} for Identity"):
        keyword_arguments(nn.Identity(), batch)


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        ({"input_ids": torch.zeros(2, 5, dtype=torch.long), "mask": torch.zeros(2, 1, 5, 5)}, 10),
        ({"mask": torch.zeros(2, 1, 5, 5), "input_ids": torch.zeros(2, 5, dtype=torch.long)}, 10),
        ({"hidden": torch.zeros(2, 5, 16)}, 10),
        ({"temperature": torch.tensor(0.5)}, 1),
        ({"flag": True}, 0),
        ({}, 0),
    ],
)
def test_tokens_are_positions(arguments: dict[str, Any], tokens: int) -> None:
    assert count_tokens(arguments) == tokens
