"""Results are JSON, whatever their numbers are."""

import json
import math

import pytest

from qcompile.strict_json import finite, to_json


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_null(number: float) -> None:
    text = to_json({"a": [1.5, (number, "Δ")], "b": {"c": number}, "d": None})
    assert json.loads(text) == {"a": [1.5, [None, "Δ"]], "b": {"c": None}, "d": None}
    assert "Δ" in text
    assert finite([number], str) == [str(number)]
