"""Records: made from a run, written, read back."""

import json
import math

import pytest
import torch

from qcompile.calibration import Calibration
from qcompile.config import Config
from qcompile.record import Record, by_reason
from qcompile.rewrite import Refusal

CONFIG = Config(alpha="auto", calibration=Calibration({}, 3, 70, {"input_ids": torch.ones(1, 2)}))
REFUSALS = (
    Refusal("find_linears", "linear_3", "model.fc: its name matches an ignore pattern"),
    Refusal("find_linears", "linear_4", "lm_head: its name matches an ignore pattern"),
    Refusal("smooth", "linear_5", "model.o: nothing before its input can take a scale"),
    Refusal("canonicalize", "mm", "addmm scales its sum"),
)


def test_a_run_says_what_was_left_alone_and_why() -> None:
    record = Record.of(CONFIG, {"model.fc": "its module has forward hooks"}, REFUSALS, {"tower.fc": "unseen"})
    assert record.kept == {
        "model.fc": "its module has forward hooks",
        "lm_head": "its name matches an ignore pattern",
        "tower.fc": "unseen",
    }
    assert record.unsmoothed == {"model.o": "nothing before its input can take a scale"}
    assert (record.batches, record.tokens, record.alpha) == (3, 70, "auto")


def test_it_comes_back_also_from_another_version() -> None:
    record = Record.of(CONFIG, {}, REFUSALS, {})
    values = json.loads(record.to_json())
    assert Record.from_dict({**values, "later": 1}) == record
    del values["dtype"]
    with pytest.raises(TypeError, match="dtype"):
        Record.from_dict(values)


def test_names_that_share_a_reason_are_told_together() -> None:
    found = {"a": "small", "b": "large", "c": "large", **{f"layers.{i}": "unseen" for i in range(4)}, "d": "large"}
    assert by_reason(found) == [("a", "small"), ("b, c, d", "large"), ("layers.0 and 3 more", "unseen")]
    assert by_reason({"a": "x", "b": "x"}, quote="`") == [("`a`, `b`", "x")]
    assert by_reason({}) == []


def test_quality_that_is_not_finite_comes_back() -> None:
    record = Record("int8", "token", 0.5, "none", 1, 2, quality={"change": math.nan, "NLL": 1.5})
    again = Record.from_dict(json.loads(record.to_json(), parse_constant=pytest.fail))
    assert math.isnan(again.quality["change"])
    assert again.quality["NLL"] == 1.5
    with pytest.raises(TypeError):
        Record.from_dict({**json.loads(record.to_json()), "quality": 5})
