"""What a graph's nodes hold, as JSON and back: arguments, operators, metadata values."""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

import qcompile.ops  # noqa: F401 — registers the dialect, which graphs may call
from qcompile.errors import GraphError
from qcompile.saved_graph.symbolic_text import Symbols, expression_text

NAMESPACES = ("aten", "prims", "qcompile")
# What lowered graphs call on top; files that users exchange may not.
LOWERED = (*NAMESPACES, "qcompile_cpu", "qcompile_triton", "_c10d_functional", "transformers")
# What computes with sizes.
PYTHON = {
    "getitem": operator.getitem, "add": operator.add, "sub": operator.sub, "mul": operator.mul,
    "floordiv": operator.floordiv, "truediv": operator.truediv, "mod": operator.mod, "neg": operator.neg,
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "and_": operator.and_, "or_": operator.or_, "sym_max": torch.sym_max, "sym_min": torch.sym_min,
    "sym_int": torch.sym_int, "sym_float": torch.sym_float, "sym_not": torch.sym_not, "sym_ite": torch.sym_ite,
    "ceil": math.ceil, "floor": math.floor, "trunc": math.trunc,
}  # fmt: skip
NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def target_text(target: Any, namespaces: Sequence[str] = NAMESPACES) -> str:
    """An operator by name. Raises GraphError if `target_of` would not find it."""
    text = str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    if text.count(".") != 2 and PYTHON.get(text) is not target:
        raise GraphError(f"only operators of {', '.join(namespaces)} and arithmetic can be saved; got {text}")
    target_of(text, namespaces)
    return text


def target_of(text: object, namespaces: Sequence[str] = NAMESPACES) -> Any:
    """The operator of a name: an overload of a known library that touches no file, or arithmetic. Raises GraphError."""
    if isinstance(text, str) and text in PYTHON:
        return PYTHON[text]
    parts = text.split(".") if isinstance(text, str) else []
    if len(parts) == 3 and parts[0] in namespaces and all(part.isidentifier() for part in parts):
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        found = getattr(packet, parts[2], None)
        if isinstance(found, torch._ops.OpOverload) and not _touches_files(found):
            return found
    raise GraphError(f"a graph may call operators of {', '.join(namespaces)} and arithmetic; got {str(text)[:80]!r}")


def _touches_files(target: torch._ops.OpOverload) -> bool:
    """aten::from_file and what may come after it."""
    return any("file" in argument.name for argument in target._schema.arguments) or "file" in target._schema.name


def encode(value: Any) -> Any:
    """A node's argument as JSON. Raises GraphError."""
    if isinstance(value, Node):
        return {"node": value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, tuple | list):
        inside = [encode(item) for item in value]
        return {"tuple": inside} if isinstance(value, tuple) else inside
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, kind in NAMED.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise GraphError(f"an argument of type {type(value).__name__} cannot be saved; run the passes in one process")


def decode(value: Any, nodes: Mapping[str, Node]) -> Any:
    """The argument again. Raises GraphError."""
    if value is None or isinstance(value, bool | int | str | float):
        return value
    if isinstance(value, list):
        return [decode(item, nodes) for item in value]
    ((kind, inside),) = value.items()
    if kind == "node":
        return nodes[inside]
    if kind == "tuple":
        return tuple(decode(item, nodes) for item in inside)
    if kind == "float" and inside in ("inf", "-inf", "nan"):
        return float(inside)
    if kind == "device":
        return torch.device(inside)
    return named(kind, inside)


def named(kind: str, name: str) -> Any:
    """torch.float32 and the like. Raises GraphError."""
    found = getattr(torch, name, None)
    if kind not in NAMED or not isinstance(found, NAMED[kind]):
        raise GraphError(f"{name!r} is no {kind} that torch knows")
    return found


def encode_value(value: Any) -> Any:
    """A metadata value, such as a fake tensor, as JSON."""
    if isinstance(value, torch.Tensor):
        sizes, strides = ([_encode_size(size) for size in sizes] for sizes in (value.shape, value.stride()))
        place = [int(value.storage_offset())] if _is_offset(value) else []
        return {"tensor": [str(value.dtype).removeprefix("torch."), sizes, strides, str(value.device), *place]}
    for kind, symbolic in SYMBOLIC.items():
        if isinstance(value, symbolic):
            return {kind: expression_text(value)}
    if isinstance(value, tuple | list):
        inside = [encode_value(item) for item in value]
        return {"tuple": inside} if isinstance(value, tuple) else inside
    return encode(value)


SYMBOLIC: dict[str, Any] = {"int": torch.SymInt, "float_symbol": torch.SymFloat, "bool": torch.SymBool}


def _encode_size(size: Any) -> Any:
    return {"int": expression_text(size)} if isinstance(size, torch.SymInt) else int(size)


def decode_value(value: Any, symbols: Symbols) -> Any:
    """The metadata value again; fake tensors under the fake mode that is active."""
    if isinstance(value, list):
        return [decode_value(item, symbols) for item in value]
    if not isinstance(value, dict):
        return decode(value, {})
    ((kind, inside),) = value.items()
    if kind in SYMBOLIC:
        return symbols.value(kind.partition("_")[0], inside)
    if kind == "tuple":
        return tuple(decode_value(item, symbols) for item in inside)
    if kind != "tensor":
        return decode(value, {})
    dtype, *shape, device = inside[:4]
    sizes, strides = ([decode_value(size, symbols) for size in sizes] for sizes in shape)
    tensor = torch.empty_strided(sizes, strides, dtype=named("dtype", dtype), device=device)
    return _moved(tensor, *inside[4:]) if inside[4:] else tensor


def _is_offset(value: torch.Tensor) -> bool:
    """Whether a tensor begins later than its memory: code for GPUs depends on where."""
    return isinstance(value.storage_offset(), int) and value.storage_offset() > 0


def _moved(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    elements = tensor.untyped_storage().nbytes() // tensor.itemsize
    return tensor.new_empty(offset + elements).as_strided(tensor.shape, tensor.stride(), offset)
