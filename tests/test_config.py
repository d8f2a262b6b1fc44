"""Options check themselves: every mistake is one line that says what was received."""

import copy
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.calibration import Calibration, Statistic
from qcompile.config import Config
from qcompile.errors import CalibrationError, ConfigError


def calibration(value: float = 1.0) -> Calibration:
    absmax: Tensor = torch.full((4,), value)
    return Calibration({"fc.weight": Statistic(absmax, absmax[None], torch.zeros(16))}, 1, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "int4"),
        ("dtype", torch.int8),
        ("dtype", None),
        ("dtype", ["int8"]),
        ("activations", "row"),
        ("activations", None),
        ("alpha", -0.1),
        ("alpha", 1.5),
        ("alpha", float("nan")),
        ("alpha", "0.5"),
        ("alpha", True),
        ("calibration", 3),
        ("calibration", {"fc.weight": 1.0}),
        ("calibrate", -1),
        ("calibrate", 2.0),
        ("calibrate", True),
        ("calibrate", "4"),
        ("ignore", 3),
        ("ignore", None),
        ("ignore", ["lm_head", 3]),
        ("verify", 1),
        ("verify", "yes"),
        ("dump", 3),
        ("dump", b"folder"),
        ("dump", True),
        ("tiles", 3),
        ("clip", "most"),
        ("clip", 0.99),
        ("power_of_two", "both"),
        ("power_of_two", True),
        ("inner", "aot_eager"),
        ("mode", "fast"),
        ("mode", []),
    ],
)
def test_a_bad_value_is_refused_in_one_line(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**{field: value})
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(field)
    assert (type(value).__name__ if field == "calibration" else repr(value)) in message


def test_every_field_has_a_bad_value_above() -> None:
    marks = test_a_bad_value_is_refused_in_one_line.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in marks[0].args[1]} == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize(
    ("option", "suggestion"),
    [("alfa", "alpha"), ("calibrations", "calibrat"), ("activation", "activations"), ("ignored", "ignore")],
)
def test_an_unknown_option_gets_a_suggestion(option: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option '{option}'.*did you mean '{suggestion}"):
        Config.from_options({option: 1})


@pytest.mark.parametrize("option", ["xyzzy", 3])
def test_an_option_like_no_other_gets_the_list(option: Any) -> None:
    with pytest.raises(ConfigError, match=f"unknown option {option!r}.*the options are dtype, activations") as caught:
        Config.from_options({option: 1})
    for field in dataclasses.fields(Config):
        assert field.name in str(caught.value)


def test_alpha_asked_for_needs_statistics() -> None:
    with pytest.raises(ConfigError, match=r"alpha=0\.7 needs activation statistics; got no calibration"):
        Config.from_options({"alpha": 0.7})


@pytest.mark.parametrize(
    "options", [{"calibrate": 2}, {"calibration": calibration()}], ids=["calibrate", "calibration"]
)
def test_alpha_acts_on_calibrated_models(options: dict[str, Any]) -> None:
    assert Config.from_options({"alpha": 0.7, **options}).smooths
    assert Config.from_options(options).smooths
    assert not Config.from_options({"alpha": None, **options}).smooths


def test_without_statistics_nothing_is_smoothed() -> None:
    assert not Config().smooths
    assert not Config.from_options({"alpha": None}).smooths


def test_alpha_auto_needs_a_calibration() -> None:
    assert Config(alpha="auto", calibrate=1).smooths
    with pytest.raises(ConfigError, match="alpha=auto needs activation statistics"):
        Config.from_options({"alpha": "auto"})


def test_power_of_two_is_one_of_three() -> None:
    with pytest.raises(ConfigError, match="power_of_two must be one of 'off', 'absorb', 'drop'; got True"):
        Config(power_of_two=True)


def test_calibration_and_calibrate_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="calibration and calibrate exclude each other; got both"):
        Config(calibration=calibration(), calibrate=1)


def test_static_activations_need_statistics() -> None:
    with pytest.raises(ConfigError, match='activations="static" needs activation ranges; got no calibration'):
        Config(activations="static")
    assert Config(activations="static", calibrate=1).calibrated
    assert Config(activations="static", calibration=calibration()).calibrated


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_is_loaded_once(kind: Any, tmp_path: Path) -> None:
    file = tmp_path / "calibration.safetensors"
    calibration(3.0).save(file)
    first, second = Config(calibration=kind(file)), Config(calibration=kind(file))
    assert isinstance(first.calibration, Calibration)
    assert first.calibration.statistics["fc.weight"].absmax.tolist() == [3.0] * 4
    assert first == second
    assert hash(first) == hash(second)


def test_a_file_written_anew_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "calibration.safetensors"
    calibration(3.0).save(file)
    first = Config(calibration=str(file))
    calibration(4.0).save(file)
    os.utime(file, ns=(1, 1))
    second = Config(calibration=str(file))
    assert first != second
    assert second.calibration is not None
    assert second.calibration.statistics["fc.weight"].absmax.tolist() == [4.0] * 4


def test_a_file_that_appears_later_is_found(tmp_path: Path) -> None:
    file = tmp_path / "calibration.safetensors"
    with pytest.raises(CalibrationError, match="no calibration file at"):
        Config(calibration=str(file))
    calibration().save(tmp_path / "other")
    shutil.move(tmp_path / "other", file)
    assert Config(calibration=str(file)).calibrated


def test_equal_options_are_one_key() -> None:
    shared = calibration()
    left = Config(alpha=0.5, calibration=shared, ignore=("a", "b"))
    right = Config(alpha=0.5, calibration=shared, ignore=["a", "b"])  # type: ignore[arg-type]
    assert left == right
    assert len({left, right}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "fp8"},
        {"activations": "tensor"},
        {"alpha": 0.6},
        {"calibration": calibration()},
        {"calibrate": 1},
        {"ignore": ()},
        {"verify": True},
        {"dump": "folder"},
        {"tiles": "tiles.json"},
        {"inner": "eager"},
        {"mode": "max-autotune"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_option_is_part_of_the_key(change: dict[str, Any]) -> None:
    assert Config(**change) != Config()


def test_calibrations_are_told_apart_by_identity() -> None:
    assert Config(calibration=calibration()) != Config(calibration=calibration())


def test_a_deep_copy_is_the_same_key() -> None:
    config = Config(calibration=calibration())
    assert copy.deepcopy(config) == config


@pytest.mark.parametrize(("given", "kept"), [("lm_head", ("lm_head",)), (["a*", "b"], ("a*", "b")), ((), ())])
def test_ignore_becomes_a_tuple(given: Any, kept: tuple[str, ...]) -> None:
    assert Config(ignore=given).ignore == kept


def test_a_dump_folder_may_be_a_path(tmp_path: Path) -> None:
    assert Config(dump=tmp_path).dump == str(tmp_path)  # type: ignore[arg-type]


def test_mode_arrives_beside_the_options() -> None:
    assert Config.from_options(None, "reduce-overhead").mode == "reduce-overhead"
    assert Config.from_options({"mode": "max-autotune"}, "reduce-overhead").mode == "max-autotune"
    assert Config.from_options(None) == Config()


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [("int8", torch.int8), ("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)],
)
def test_dtypes_have_a_tensor_type(dtype: Any, torch_dtype: torch.dtype) -> None:
    assert Config(dtype=dtype).torch_dtype == torch_dtype
