"""Arguments, operators and metadata values as JSON and back."""

import json
import math
import operator
from typing import Any

import pytest
import torch
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from qcompile.errors import GraphError
from qcompile.saved_graph.symbolic_text import Symbols
from qcompile.saved_graph.values import decode, decode_value, encode, encode_value, named, target_of, target_text

aten = torch.ops.aten


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, -1.5, math.inf, -math.inf, "relu", [1, [2, None]], (1, (2,)), torch.int8, torch.float8_e4m3fn,
        torch.device("cpu"), torch.strided, torch.channels_last, [],
    ],
)  # fmt: skip
def test_arguments_come_back(value: Any) -> None:
    found = decode(json.loads(json.dumps(encode(value))), {})
    assert (found, type(found)) == (value, type(value))


def test_nodes_come_back_by_name() -> None:
    node = Graph().placeholder("x")
    assert decode(encode([node, 1]), {"x": node}) == [node, 1]
    assert math.isnan(decode(encode(math.nan), {}))


def test_what_cannot_be_saved_is_said() -> None:
    with pytest.raises(GraphError, match="an argument of type object cannot be saved"):
        encode(object())


@pytest.mark.parametrize("target", [aten.mm.default, torch.ops.qcompile.quantize.default, operator.getitem, math.ceil])
def test_operators_come_back(target: Any) -> None:
    assert target_of(target_text(target)) is target


@pytest.mark.parametrize(
    "text",
    ["aten.from_file.default", "aten.nothing.default", "os.system.default", "aten.mm", "system", "eval", None,
     "aten..mm", "aten.__class__.default", "higher_order.cond.default"],
)  # fmt: skip
def test_other_names_are_refused(text: object) -> None:
    with pytest.raises(GraphError, match="^a graph may call operators of aten, prims, qcompile and arithmetic; got "):
        target_of(text)


@pytest.mark.parametrize("target", [torch.load, print, torch.ops.aten.from_file.default])
def test_other_functions_are_not_saved(target: Any) -> None:
    with pytest.raises(GraphError):
        target_text(target)


def test_an_impostor_of_arithmetic_is_not_saved() -> None:
    def getitem() -> None: ...

    with pytest.raises(GraphError, match="only operators of"):
        target_text(getitem)


@pytest.mark.parametrize(("kind", "name"), [("dtype", "load"), ("device", "cpu"), ("layout", "int8"), ("x", "int8")])
def test_only_what_is_meant_is_looked_up_in_torch(kind: str, name: str) -> None:
    with pytest.raises(GraphError, match="that torch knows"):
        named(kind, name)


def test_fake_values_keep_shape_stride_dtype_and_symbols() -> None:
    symbols = Symbols(ShapeEnv())
    symbols.restore([["Symbol('s0', integer=True, positive=True)", 9, 2, 64]])
    size = symbols.value("int", "Symbol('s0', integer=True, positive=True)")
    with torch._subclasses.FakeTensorMode(shape_env=symbols.environment):
        value = (torch.empty_strided((size, 3), (1, size), dtype=torch.int8), [size, 4], None)
        text = json.dumps(encode_value(value))
        found = decode_value(json.loads(text), symbols)
    assert json.dumps(encode_value(found)) == text
    assert str(found[0].shape) == "torch.Size([s0, 3])"
    assert found[1][0].node.hint == 9
