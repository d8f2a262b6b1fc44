"""Symbolic sizes survive as text, and text that is no arithmetic is never run."""

import pytest
import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Max, Mod

from qcompile.errors import GraphError
from qcompile.saved_graph.symbolic_text import Symbols, expression, expression_text

S = sympy.Symbol("s0", positive=True, integer=True)
T = sympy.Symbol("s77", integer=True)


@pytest.mark.parametrize(
    "value", [S, S + T, 3 * S - 1, S**2, FloorDiv(S, 2), Mod(T, 4), Max(S, T), sympy.Eq(S, T), sympy.Integer(-7)]
)
def test_a_text_means_what_it_was_made_of(value: sympy.Expr) -> None:
    assert expression(sympy.srepr(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('echo bad')",
        "Symbol('s0').__class__",
        "Symbol('a; import os')",
        "Symbol('s0', integer=[])",
        "(lambda: 1)()",
        "open('x')",
        "exec",
        "[1]",
        "Pow(Integer(9), Integer(99999999))",
        "Integer(10**100)",
        f"Integer({2**70})",
        "Add(",
        "Add(Integer(1), 'x')",
        "Integer(1, evaluate=False)",
        "(" * 3000 + ")" * 3000,
        "",
        None,
        7,
        "x" * 20000,
    ],
)
def test_anything_else_is_refused(text: object) -> None:
    with pytest.raises(GraphError, match="^a symbolic size must be arithmetic of symbols; got "):
        expression(text)


def test_symbols_keep_their_names_values_and_ranges() -> None:
    first = Symbols(ShapeEnv())
    positive, plain = "Symbol('s0', integer=True, positive=True)", "Symbol('s77', integer=True)"
    described = [[positive, 9, 2, 64], [plain, 5, None, None]]
    first.restore(described)
    assert [row[:3] for row in first.describe()] == [row[:3] for row in described]
    size = first.value("int", "Add(Symbol('s0', integer=True, positive=True), Integer(1))")
    assert isinstance(size, torch.SymInt)
    assert (str(size), size.node.hint) == ("s0 + 1", 10)
    assert first.value("int", expression_text(size)).node.expr == size.node.expr
    limits = first.environment.var_to_range[S]
    assert (limits.lower, limits.upper) == (2, 64)


def test_a_symbol_must_be_a_name() -> None:
    with pytest.raises(GraphError, match="a symbol must be a name"):
        Symbols(ShapeEnv()).restore([["Integer(3)", 3, 0, 9]])


def test_what_depends_on_data_has_no_value() -> None:
    symbols = Symbols(ShapeEnv())
    symbols.restore([["Symbol('u0', integer=True)", None, 0, None]])
    assert symbols.value("int", "Symbol('u0', integer=True)").node.hint is None
