"""Transfer rules of the gauge analysis: for each op, what scaled inputs do to its result.

Notation: x' = x · s[label]; "free" is a label that nothing has pinned yet. Each rule's docstring is its identity.
A rule takes the sweep and a node, constrains variables, and returns the labels of the node's result (a list for a
tuple). Ops that are not in RULES get pin_all, which is always right.
"""

import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from qcompile.grouped_ops import grouped_linear
from qcompile.passes.gauge_pins import pin_all, pin_operand, unscaled
from qcompile.passes.gauge_products import attends, batched, contracts, grouped, linear, normalizes
from qcompile.passes.scale_variables import ANY, ONE, Labels, elementwise, ones
from qcompile.passes.symbolic_sizes import must_agree
from qcompile.rewrite import args_of, hint, shape_of

if TYPE_CHECKING:
    from qcompile.passes.gauge import Sweep

aten = torch.ops.aten
prims = torch.ops.prims

Rule = Callable[["Sweep", Node], Any]


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument, Node) and isinstance(argument.meta["val"], Tensor)


def _operand(sweep: "Sweep", operand: Node, node: Node) -> Tensor:
    """Labels of an elementwise operand: a static one absorbs scales, a literal zero takes any."""
    if operand not in sweep.static:
        return sweep.labels(operand)
    constant = _constant(sweep, operand)
    if constant is not None and not bool(torch.any(constant)):
        return ones(shape_of(operand)) + ANY
    return sweep.static_operand(operand, node)


def _constant(sweep: "Sweep", node: Node) -> Tensor | None:
    """The value of a constant of the graph, also through the copy that capture makes of it; None for other nodes."""
    while node.target is aten.lift_fresh_copy.default:
        node = args_of(node)[0]
    return sweep.constant(node) if node.op == "get_attr" else None


def reads_shape(sweep: "Sweep", node: Node) -> None:
    """Sizes and strides do not depend on values."""


def takes_result(sweep: "Sweep", node: Node) -> Any:
    """(a, b)[i]."""
    source, index = args_of(node)
    meaning = sweep.results(source)
    return meaning[index] if isinstance(meaning, list) else pin_all(sweep, node)


def passes_through(sweep: "Sweep", node: Node) -> Tensor:
    """f(x·s) = f(x)·s for s > 0: copies, casts, neg, abs, relu."""
    return sweep.labels(node.all_input_nodes[0])


def clamps(sweep: "Sweep", node: Node) -> Any:
    """max(x·s, 0) = max(x, 0)·s; any other bound is a constant that would need the scale too."""
    bounds = [*node.args[1:], *node.kwargs.values()]
    return passes_through(sweep, node) if all(b is None or b == 0 for b in bounds) else pin_all(sweep, node)


def compares(sweep: "Sweep", node: Node) -> Any:
    """x·s > 0 = x > 0; against anything else it is not."""
    return unscaled(node.meta["val"]) if node.args[1] == 0 else pin_all(sweep, node)


def fills(sweep: "Sweep", node: Node) -> Tensor:
    """0·s = 0: a tensor of zeros takes any scale."""
    value = 0
    if node.target in (aten.full.default, aten.full_like.default):
        value = args_of(node)[1]
    elif node.target is aten.scalar_tensor.default:
        value = args_of(node)[0]
    return ones(shape_of(node)) + (ANY if value == 0 else ONE)


def reshapes(sweep: "Sweep", node: Node) -> Tensor:
    """view(x·s) = view(x)·view(s)."""
    x = node.all_input_nodes[0]
    front, back = must_agree(x.meta["val"].shape, node.meta["val"].shape)
    labels = _same_at_offsets(sweep, sweep.labels(x), front, node).reshape(shape_of(node))
    return _same_at_offsets(sweep, labels, back, node)


def expands(sweep: "Sweep", node: Node) -> Tensor:
    """expand(x·s) = expand(x)·expand(s)."""
    return sweep.labels(node.all_input_nodes[0]).expand(shape_of(node))


def moves(sweep: "Sweep", node: Node) -> Any:
    """permute, slice, split, flip, … of (x·s) = the same of x times the same of s: run on the labels."""
    x, *symbols = node.all_input_nodes
    labels = sweep.labels(x)
    if symbols and node.target is not aten.repeat.default:
        labels = _same_at_offsets(sweep, labels, _offset_dims(node, labels.ndim), node)

    def concrete(arg: Any) -> Any:
        if not isinstance(arg, Node):
            return arg
        return labels if arg is x else hint(arg.meta["val"])

    target: Any = node.target
    result = target(*torch.fx.node.map_aggregate(args_of(node), concrete), **node.kwargs)
    return list(result) if isinstance(result, list | tuple) else result


def _same_at_offsets(sweep: "Sweep", labels: Tensor, dims: Iterable[int], node: Node) -> Tensor:
    """Symbolic offsets are known by their hint only: at another size other elements would be meant."""
    return sweep.unify_along(labels, dims, node, "cut or joined at a symbolic place").expand(labels.shape)


def _offset_dims(node: Node, rank: int) -> Iterable[int]:
    args = args_of(node)
    if node.target in (aten.slice.Tensor, aten.select.int):
        return [args[1] % rank]
    if node.target in (aten.split.Tensor, aten.split_with_sizes.default):
        return [(args[2] if len(args) > 2 else 0) % rank]
    return range(rank)


def pads(sweep: "Sweep", node: Node) -> Any:
    """pad(x·s) = pad(x)·pad(s) when padding with zeros."""
    x, padding, *fill = args_of(node)
    value = fill[0] if fill else 0
    widths = [hint(w.meta["val"]) if isinstance(w, Node) else hint(w) for w in padding]
    if value != 0:
        return pin_all(sweep, node)
    labels = sweep.labels(x)
    symbolic = {labels.ndim - 1 - i // 2 for i, width in enumerate(padding) if not isinstance(width, int)}
    return aten.constant_pad_nd(_same_at_offsets(sweep, labels, symbolic, node), widths, ANY)


def concatenates(sweep: "Sweep", node: Node) -> Tensor:
    """cat([x·s, y·t]) = cat([x, y])·cat([s, t])."""
    shape = shape_of(node)
    parts, *dims = args_of(node)
    labels = [_operand(sweep, part, node) for part in parts if len(shape_of(part)) == len(shape)]
    dim = int(dims[0] if dims else 0) % len(shape)
    for other in range(len(shape)):
        if other != dim and all(part.stride(other) == 0 and part.shape[other] for part in labels):
            labels = [part.narrow(other, 0, 1) for part in labels]
    joined = torch.cat(labels, dim).expand(shape)
    symbolic = any(isinstance(size, torch.SymInt) for part in parts for size in part.meta["val"].shape[dim : dim + 1])
    return _same_at_offsets(sweep, joined, [dim] if symbolic else [], node)


def overwrites(sweep: "Sweep", node: Node) -> Tensor:
    """copy(x, y·s) = y·s: nothing is left of x but its shape."""
    return _operand(sweep, args_of(node)[1], node).expand(shape_of(node))


def scatters(sweep: "Sweep", node: Node) -> Any:
    """x·s with a part replaced by y·t: x with that part replaced, times s with the part replaced by t."""
    x, part, *place = args_of(node)
    if any(isinstance(arg, Node) for arg in place):
        return pin_all(sweep, node)  # at another size another part would be meant
    target: Any = node.target
    return target(_operand(sweep, x, node), _operand(sweep, part, node), *place)


def multiplies(sweep: "Sweep", node: Node) -> Tensor:
    """(x·s)·y = (x·y)·s where y is not scaled. Of two scaled factors a parameter is pinned, else both are."""
    operands = [arg for arg in args_of(node)[:2] if _is_tensor(arg)]
    if len(operands) == 1:
        return sweep.labels(operands[0]).expand(shape_of(node))
    variables, (left, right) = sweep.variables, operands

    def product(a: Labels, b: Labels) -> Labels:
        both = variables.free(a) & variables.free(b)
        reason = sweep.why("multiplied by another scaled value", node)
        if left in sweep.static or right not in sweep.static:
            variables.pin(a[both], reason)
        if right in sweep.static or left not in sweep.static:
            variables.pin(b[both], reason)
        scaled = np.where(variables.free(a), a, np.where(variables.free(b), b, np.maximum(a, b)))
        return np.where((a == ANY) | (b == ANY), ANY, scaled)

    return elementwise(product, _operand(sweep, left, node), _operand(sweep, right, node)).expand(shape_of(node))


def divides(sweep: "Sweep", node: Node) -> Any:
    """(x·s) / y = (x / y)·s: the divisor is pinned."""
    x, divisor = args_of(node)[:2]
    if not _is_tensor(x):
        return pin_all(sweep, node)
    if isinstance(divisor, Node):
        pin_operand(sweep, divisor, node, "used as a divisor")
    return _operand(sweep, x, node).expand(shape_of(node))


def adds(sweep: "Sweep", node: Node) -> Any:
    """x·s + y·s = (x + y)·s. A literal 0 fits; any other constant would need the scale too."""
    left, right = args_of(node)[:2]
    for scalar in (left, right):
        if not _is_tensor(scalar):
            return passes_through(sweep, node) if scalar == 0 else pin_all(sweep, node)
    return _meet(sweep, node, left, right, "added to a value with another scale")


def selects(sweep: "Sweep", node: Node) -> Any:
    """where(c, x·s, y·s) = where(c, x, y)·s."""
    condition, left, right = args_of(node)
    pin_operand(sweep, condition, node, "used as a condition")
    return _meet(sweep, node, left, right, "chosen against a value with another scale")


def _meet(sweep: "Sweep", node: Node, left: Node, right: Node, what: str) -> Tensor:
    def meet(a: Labels, b: Labels) -> Labels:
        sweep.variables.unify(a, b, sweep.why(what, node))
        return np.maximum(a, b)  # equal now, or one is ONE and the other pinned, or one is ANY

    return elementwise(meet, _operand(sweep, left, node), _operand(sweep, right, node)).expand(shape_of(node))


def reduces(sweep: "Sweep", node: Node) -> Tensor:
    """Σ x·s = s·Σ x when s is the same along the summed dimensions."""
    labels = sweep.labels(node.all_input_nodes[0])
    args = args_of(node)
    dims = args[1] if labels.ndim and len(args) > 1 and args[1] else range(labels.ndim)
    wrapped = [int(dim) % labels.ndim for dim in dims]
    summed = sweep.unify_along(labels, wrapped, node, "summed with a value of another scale")
    return summed.reshape(shape_of(node))


def gathers(sweep: "Sweep", node: Node) -> Any:
    """x[i] for a run-time i along some dimensions: legal when the scale is the same along them. A constant i moves."""
    x, indices = args_of(node)
    if any(index is not None and index.meta["val"].dtype == torch.bool for index in indices):
        return pin_all(sweep, node)
    labels = sweep.labels(x)
    constants = [None if index is None else _constant(sweep, index) for index in indices]
    if all(index is None or constant is not None for index, constant in zip(indices, constants, strict=True)):
        return aten.index(labels, constants)
    indexed = [dim for dim, index in enumerate(indices) if index is not None]
    labels = sweep.unify_along(labels, indexed, node, "gathered with values of another scale")
    nowhere = [None if index is None else torch.zeros(shape_of(index), dtype=torch.int64) for index in indices]
    return aten.index(labels, nowhere).expand(shape_of(node))


def _overloads(*names: str) -> list[Any]:
    """Those of the named aten overloads that this torch has."""
    found = []
    for name in names:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(aten, packet, None), overload or "default", None)
        if op is not None:
            found.append(op)
    return found


_TABLE: tuple[tuple[Rule, list[Any]], ...] = (
    (reads_shape, [*_overloads("sym_size.int", "sym_stride.int", "sym_numel", "sym_storage_offset")]),
    (takes_result, [operator.getitem]),
    (
        passes_through,
        [
            *_overloads("clone", "detach", "alias", "contiguous", "_to_copy", "neg", "abs", "relu", "lift_fresh_copy"),
            prims.convert_element_type.default,
        ],
    ),
    (clamps, _overloads("clamp", "clamp_min", "clamp_max")),
    (compares, _overloads("gt.Scalar", "ge.Scalar", "lt.Scalar", "le.Scalar", "eq.Scalar", "ne.Scalar")),
    (fills, _overloads("full", "full_like", "zeros", "zeros_like", "new_zeros", "scalar_tensor")),
    (
        reshapes,
        _overloads("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "squeeze.dim", "squeeze.dims"),
    ),
    (expands, _overloads("expand")),
    (
        moves,
        [
            *_overloads("t", "permute", "transpose.int", "flip", "roll", "repeat", "slice.Tensor", "select.int"),
            *_overloads("split.Tensor", "split_with_sizes", "unbind.int"),
            prims.rev.default,
        ],
    ),
    (pads, _overloads("constant_pad_nd")),
    (concatenates, _overloads("cat")),
    (overwrites, _overloads("copy")),
    (scatters, _overloads("slice_scatter", "select_scatter")),
    (multiplies, _overloads("mul.Tensor", "mul.Scalar")),
    (divides, _overloads("div.Tensor", "div.Scalar")),
    (adds, _overloads("add.Tensor", "sub.Tensor", "add.Scalar", "sub.Scalar")),
    (selects, _overloads("where.self")),
    (reduces, _overloads("sum", "sum.dim_IntList", "mean", "mean.dim")),
    (contracts, _overloads("mm")),
    (batched, _overloads("bmm")),
    (grouped, [grouped_linear]),
    (linear, _overloads("linear")),
    (normalizes, _overloads("native_layer_norm", "_fused_rms_norm")),
    (
        attends,
        _overloads(
            "scaled_dot_product_attention",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_attention_math",
        ),
    ),
    (gathers, _overloads("index.Tensor")),
)
RULES: dict[Any, Rule] = {op: rule for rule, targets in _TABLE for op in targets}
