"""Arguments of calls: moved, cut, told apart, and written to files."""

import json
from typing import Any

import pytest
import torch

from qcompile import call_arguments

NESTED = {"x": torch.ones(2, 3), "given": {"sizes": [(1, 2), (3, 4)], "scale": 0.5, "mask": torch.zeros(2), "": None}}


def shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in call_arguments.tensors_in(value)]


def test_tensors_are_replaced_wherever_they_are() -> None:
    cache = object()
    found = call_arguments.map_tensors(lambda tensor: tensor[:1], {**NESTED, "cache": cache})
    assert shapes(NESTED) == [(2, 3), (2,)]
    assert shapes(found) == [(1, 3), (1,)]
    assert found["given"]["sizes"] == [(1, 2), (3, 4)]
    assert found["cache"] is cache


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"ids": ids(3, 50), "flag": True}, [(1, 32)]),
        ({"ids": ids(3, 50), "mask": torch.ones(3, 50), "flags": torch.ones(3, 50) > 0}, [(1, 32)] * 3),
        ({"ids": ids(3, 50), "decoder_ids": ids(3, 40)}, [(1, 32)] * 2),
        ({"ids": ids(3, 8), "given": {"kinds": ids(3, 8)}}, [(1, 8)] * 2),
        ({"ids": ids(3, 50), "image": torch.ones(3, 3, 8, 8)}, [(3, 50), (3, 3, 8, 8)]),
        ({"ids": ids(3, 50), "mask": torch.ones(3, 1, 50, 50)}, [(3, 50), (3, 1, 50, 50)]),
        ({"ids": ids(3, 50), "step": ids(3)}, [(3, 50), (3,)]),
        ({"hidden": torch.ones(3, 50)}, [(3, 50)]),
    ],
)
def test_calls_of_tokens_are_cut(call: dict[str, Any], expected: list[tuple[int, ...]]) -> None:
    assert shapes(call_arguments.short_copy(call)) == expected


def test_a_copy_does_not_follow_what_it_was_made_of() -> None:
    call = {"x": torch.ones(2, 3), "given": [torch.ones(2)]}
    copied = call_arguments.short_copy(call)
    for tensor in call_arguments.tensors_in(call):
        tensor.zero_()
    assert all(tensor.all() for tensor in call_arguments.tensors_in(copied))


def test_kinds_of_calls_are_told_apart_by_all_but_tensors() -> None:
    def kind(**arguments: Any) -> Any:
        return call_arguments.kind_of(arguments)

    x, y = torch.ones(2, 3), torch.zeros(4, 3)
    assert kind(x=x) == kind(x=y) != kind(y=x)
    assert kind(given={"a": x, "b": 1}) == kind(given={"b": 1, "a": y}) != kind(given={"a": x, "b": 2})
    different = [kind(v=v) for v in (1, True, "1", [1], (1,), [1, 2], {"a": 1}, {"b": 1}, None, object(), x)]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize(
    "value",
    [{1: 2}, {"a": [object()]}, torch.float32, {1, 2}, ({"b": b"bytes"},)],
    ids=["key", "object", "dtype", "set", "bytes"],
)
def test_what_a_file_cannot_hold(value: object) -> None:
    assert call_arguments.is_storable(NESTED)
    assert not call_arguments.is_storable({"x": NESTED["x"], "other": value})


def test_values_come_back_from_json() -> None:
    tensors: dict[str, torch.Tensor] = {}
    found = call_arguments.from_plain(json.loads(json.dumps(call_arguments.to_plain(NESTED, tensors))), tensors)
    assert torch.equal(found.pop("x"), NESTED["x"])
    assert torch.equal(found["given"].pop("mask"), torch.zeros(2))
    assert found == {"given": {"sizes": [(1, 2), (3, 4)], "scale": 0.5, "": None}}


@pytest.mark.parametrize(
    "plain",
    [
        [1], {}, {"tensor": "0"}, {"tensor": []}, {"set": [1]}, {"list": 3}, {"dict": [1]}, {"list": [], "tuple": []},
        {"dict": {"a": {"b": 1}}},
    ],
    ids=str,
)  # fmt: skip
def test_what_was_never_written_is_refused(plain: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        call_arguments.from_plain(plain, {})
