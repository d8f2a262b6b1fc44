"""JSON of results. Python's own writes NaN and Infinity, which are no JSON, and which other readers refuse."""

import json
import math
from collections.abc import Callable
from typing import Any


def to_json(value: Any) -> str:
    """Text of dicts, lists, text and numbers; a number that is not finite becomes null."""
    return json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def finite(value: Any, instead: Callable[[float], Any] = lambda number: None) -> Any:
    """A value with something else in place of every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else instead(value)
    if isinstance(value, dict):
        return {str(key): finite(item, instead) for key, item in value.items()}
    return [finite(item, instead) for item in value] if isinstance(value, list | tuple) else value
