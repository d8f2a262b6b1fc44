"""Symbolic sizes as text and back, without evaluating the text.

The text is sympy's srepr, as torch.export writes it too. torch hands such text to sympy.sympify, which runs it as
Python; here it is parsed, and only known functions of known symbols come of it.
"""

import ast
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions
from torch.utils._sympy.numbers import int_oo

from qcompile.errors import GraphError

RENAMED = hasattr(ShapeEnv, "add_backed_var_to_val")  # as torch 2.13 calls it
LARGEST = 2**63
LONGEST = 10_000
SYMPY = ("Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Eq", "Ne", "Equality",
         "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "And",
         "Or", "Not")  # fmt: skip
TORCH = ("FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv",
         "IntTrueDiv", "FloatTrueDiv", "TruncToInt", "RoundToInt", "ToFloat", "Identity", "Max", "Min")  # fmt: skip
FUNCTIONS: dict[str, Any] = {name: getattr(sympy, name) for name in SYMPY} | {
    name: getattr(functions, name) for name in TORCH if hasattr(functions, name)
}
CONSTANTS = {"true": sympy.true, "false": sympy.false}


def expression_text(value: torch.SymInt | torch.SymFloat | torch.SymBool) -> str:
    """The text of a symbolic value."""
    return str(sympy.srepr(value.node.expr))


def expression(text: object) -> Any:
    """The sympy expression that a text means. Raises GraphError for anything but arithmetic of symbols."""
    try:
        if not isinstance(text, str) or len(text) > LONGEST:
            raise ValueError
        return _evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError):
        raise GraphError(f"a symbolic size must be arithmetic of symbols; got {str(text)[:80]!r}") from None


def _evaluate(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | str) and not isinstance(node.value, bool):
        return _small(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand)
    if isinstance(node, ast.Name):
        return CONSTANTS[node.id]
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError
    arguments = [_evaluate(argument) for argument in node.args]
    keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    if node.func.id == "Symbol":
        return _symbol(*arguments, **keywords)
    if keywords or any(isinstance(argument, str) for argument in arguments):
        raise ValueError
    if node.func.id == "Pow" and not (arguments[1].is_Integer and abs(int(arguments[1])) <= 8):
        raise ValueError
    return FUNCTIONS[node.func.id](*arguments)


def _small(value: int | str) -> int | str:
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError
    return value


def _symbol(name: object, **assumptions: object) -> Any:
    plain = all(value is True or value is False for value in assumptions.values())
    if not isinstance(name, str) or not name.isidentifier() or not plain:
        raise ValueError
    return sympy.Symbol(name, **assumptions)


class Symbols:
    """The symbols of a graph: their values in the example and their ranges, kept in a shape environment."""

    def __init__(self, environment: ShapeEnv) -> None:
        self.environment = environment
        self._hints: dict[Any, int] = {}

    def describe(self) -> list[list[Any]]:
        """Text, value in the example, smallest and largest value (None: no limit) of each symbol, sorted."""
        known = getattr(self.environment, "backed_var_to_val" if RENAMED else "var_to_val")
        found = []
        for symbol in sorted(self.environment.var_to_range, key=str):
            limits = self.environment.var_to_range[symbol]
            ends = [int(end) if isinstance(end, sympy.Integer) else None for end in (limits.lower, limits.upper)]
            found.append([sympy.srepr(symbol), int(known[symbol]) if symbol in known else None, *ends])
        return found

    def restore(self, described: list[list[Any]]) -> None:
        """What `describe` gave, in this environment. Raises GraphError."""
        for text, hint, lower, upper in described:
            symbol = expression(text)
            if not isinstance(symbol, sympy.Symbol):
                raise GraphError(f"a symbol must be a name; got {text!r}")
            if hint is not None:
                getattr(self.environment, "add_backed_var_to_val" if RENAMED else "add_var_to_val")(symbol, hint)
                self._hints[symbol] = hint
            low, high = (-int_oo if lower is None else lower), (int_oo if upper is None else upper)
            self.environment.constrain_symbol_range(symbol, compiler_min=low, compiler_max=high)

    def value(self, kind: str, text: object) -> Any:
        """The symbolic value of a text. kind: "int", "float" or "bool"."""
        parsed = expression(text)
        free = parsed.free_symbols
        hint = parsed.subs(self._hints) if free <= set(self._hints) else None
        if kind == "bool":
            return self.environment.create_symboolnode(parsed)
        if kind == "float":
            return self.environment.create_symfloatnode(parsed, hint=None if hint is None else float(hint))
        return self.environment.create_symintnode(parsed, hint=None if hint is None else int(hint))
