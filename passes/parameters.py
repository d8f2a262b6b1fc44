"""Which static tensors can be written back into the parameter they come from, and how.

A graph pass edits a static tensor where it is used. Smoothing a model in place must edit the parameter instead, which
is legal only if the parameter has no other reader, and possible only if the steps from parameter to tensor can be
undone: transposes, views, copies, casts, and Gemma's 1 + g. A graph pass, in turn, avoids copies of what is large.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from qcompile.grouped_ops import grouped_linear
from qcompile.passes.find_linears import info_of
from qcompile.rewrite import args_of, input_of

aten = torch.ops.aten
SHIFTS = (aten.add.Tensor, aten.add.Scalar)
Undo = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Source:
    """The parameter a static tensor comes from. `undo` maps a new value of the tensor to the parameter's. shifted:
    whether they differ by a constant, so that a value near it costs the parameter more than one rounding."""

    parameter: Node
    undo: Undo
    shifted: bool


def source_of(static: Node) -> Source | str:
    """The source of a static tensor, or a sentence that says why there is none."""
    steps: list[Undo] = []
    shifted = False
    node = static
    while node.op == "call_function":
        undo = _undo(node)
        if undo is None:
            return f"{node.name} is computed from parameters in a way that cannot be undone"
        steps.append(undo)
        shifted |= node.target in SHIFTS
        node = next(iter(node.all_input_nodes))
    if node.op != "placeholder" or input_of(node).kind != "parameter":
        return f"{node.name} is no parameter"
    return Source(node, lambda value: _compose(steps, value), shifted)


def why_frozen(static: Node) -> str:
    """Why the parameter behind a static tensor must not be edited; empty if it may be."""
    source = source_of(static)
    if isinstance(source, str):
        return source
    record = input_of(source.parameter)
    if record.buffer:
        return f"{record.name} is a buffer"
    if record.also_read_by:
        return f"{record.name} is also read by {record.also_read_by}"
    if _narrower(source.parameter.meta["val"].dtype, static.meta["val"].dtype):
        return f"{record.name} is not stored in the dtype that it is used in"
    node = static
    while len(node.users) == 1 and node is not source.parameter:
        node = next(iter(node.all_input_nodes))
    return f"{record.name} is read more than once" if len(node.users) > 1 else ""


def _narrower(stored: torch.dtype, used: torch.dtype) -> bool:
    """Whether a new value would lose more than a rounding to the parameter's own 16 bits or more."""
    return not stored.is_floating_point or stored.itemsize < 2 or used.itemsize < stored.itemsize


def why_not_copied(static: Node) -> str:
    """Why a scaled copy of a static tensor should not be made; empty if it may.

    A graph that scales where it reads holds the scaled tensor beside the parameter. That is nothing for gains and for
    weights that become int8, and twice the model for batches of expert matrices that stay in float.
    """
    batched = any(
        user.target is aten.bmm.default or (user.target is grouped_linear and not info_of(user).quantize)
        for user in static.users
    )
    return "a batch of matrices that stay in float would be copied" if batched else ""


def _compose(steps: list[Undo], value: Tensor) -> Tensor:
    for step in steps:
        value = step(value)
    return value


def _undo(node: Node) -> Undo | None:
    target, args = node.target, args_of(node)
    source = next(iter(node.all_input_nodes)).meta["val"]
    if target in (aten.t.default, aten.transpose.int):
        dims = args[1:] or (0, 1)
        return lambda value: value.transpose(*dims)
    if target is aten.permute.default:
        order = torch.tensor(args[1]) % source.ndim
        return lambda value: value.permute(order.argsort().tolist())
    if target in (aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim):
        return lambda value: value.reshape(source.shape)
    if target in (torch.ops.prims.convert_element_type.default, aten._to_copy.default, aten.clone.default):
        return lambda value: value
    if target in SHIFTS and not node.kwargs:
        constant = next((arg for arg in args if isinstance(arg, int | float)), None)
        return None if constant is None else lambda value: value - constant
    return None
