"""Transfer rules of ops that sum over channels or tokens: matrix products, norms, attention.

Notation as in gauge_rules.py, which has the table.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompile.passes.gauge_pins import pin_all, pin_operand, unscaled
from qcompile.rewrite import args_of, hint, shape_of

if TYPE_CHECKING:
    from qcompile.passes.gauge import Sweep

aten = torch.ops.aten


def contracts(sweep: "Sweep", node: Node) -> Any:
    """Σ_k P[i,k]·(V[k,j]·s[j]) = s[j]·Σ_k P[i,k]·V[k,j], with P not scaled; and the mirror image."""
    left, right = (sweep.labels(operand) for operand in args_of(node))
    what = "summed with a value of another scale"
    if not sweep.any_free(left):
        return sweep.unify_along(right, [right.ndim - 2], node, what).expand(shape_of(node))
    if not sweep.any_free(right):
        return sweep.unify_along(left, [left.ndim - 1], node, what).expand(shape_of(node))
    return pin_all(sweep, node)


def linear(sweep: "Sweep", node: Node) -> Any:
    """Σ_k (x_k·s_k)·(W_nk·r_n / s_k) + b_n·r_n = r_n·y_n: s and r are the linear's own to choose.

    If it mixes tokens, Σ_k (x_ck·s_c)·W_nk = s_c·y_cn: the scale of a channel c passes.
    """
    x, weight, *rest = args_of(node)
    static = all(parameter is None or parameter in sweep.static for parameter in (weight, *rest))
    if not static or weight.meta["val"].ndim != 2 or shape_of(weight)[1] == 0:
        return pin_all(sweep, node)
    labels = sweep.labels(x)
    if _mixes_tokens(labels) and all(parameter is None for parameter in rest):
        return labels.narrow(-1, 0, 1).expand(shape_of(node))
    return _takes_scales(sweep, node, labels, weight, next(iter(rest), None))


def _takes_scales(sweep: "Sweep", node: Node, labels: Tensor, weight: Node, bias: Node | None) -> Tensor:
    """A weight [..., N, K] undoes scales [K] that all tokens of its input share, and makes fresh ones [N]."""
    from qcompile.passes.gauge import LinearScales

    tokens = sweep.unify_along(labels, range(labels.ndim - 1), node, "differs between tokens")
    inputs = tokens.reshape(-1).numpy()
    outputs = sweep.variables.fresh(shape_of(weight)[-2])
    sweep.freeze(weight, node, inputs)
    for edited in (weight, bias) if bias is not None else (weight,):
        sweep.freeze(edited, node, outputs)
    sweep.linears[node] = LinearScales(node, inputs, outputs)
    return torch.from_numpy(outputs).expand(shape_of(node))


def _mixes_tokens(labels: Tensor) -> bool:
    """Whether labels differ somewhere, but not along the dimension that a linear sums."""
    return labels.stride(-1) == 0 and any(labels.stride(dim) for dim in range(labels.ndim - 1))


def batched(sweep: "Sweep", node: Node) -> Any:
    """Σ_k (x_gmk·s_gk)·(W_gkn·r_gn / s_gk) = r_gn·y_gmn for each matrix g of a static batch; and the mirror image."""
    left, right = args_of(node)
    if (left in sweep.static) == (right in sweep.static):
        return contracts(sweep, node)
    x, matrix, inner = (left, right, -1) if right in sweep.static else (right, left, -2)
    outer = -3 - inner  # of the two dimensions of each matrix, the other one
    inputs = sweep.unify_along(sweep.labels(x), [3 + outer], node, "differs between tokens")
    batch, channels = shape_of(node)[0], shape_of(node)[inner]
    shape = (batch, 1, channels) if inner == -1 else (batch, channels, 1)
    outputs = sweep.variables.fresh(batch * channels).reshape(shape)
    sweep.matrices(matrix, node, inputs.transpose(-1, -2).numpy(), outputs)
    return torch.from_numpy(outputs).expand(shape_of(node))


def grouped(sweep: "Sweep", node: Node) -> Any:
    """Σ_k (x_mk·s_k)·(W_enk·r_n / s_k) = r_n·y_mn for a row m of expert e: all experts share s and r."""
    x, weight, _ = args_of(node)
    return _takes_scales(sweep, node, sweep.labels(x), weight, None)


def normalizes(sweep: "Sweep", node: Node) -> Any:
    """norm(x)·(g·s) + b·s = s·(norm(x)·g + b): the input is pinned, gain and bias take the scale."""
    for operand in node.all_input_nodes:
        if operand not in sweep.static:
            pin_operand(sweep, operand, node, "normalized")
    results = [unscaled(value) for value in node.meta["val"]]
    args = args_of(node)
    gain = args[2] if len(args) > 2 else None
    bias = args[3] if node.target is aten.native_layer_norm.default else None
    if gain is None or gain not in sweep.static or (bias is not None and bias not in sweep.static):
        return results
    labels = sweep.static_operand(gain, node)
    if bias is not None:
        sweep.unify(labels, sweep.static_operand(bias, node), node, "its bias cannot be scaled")
    return [labels.expand(shape) if i == 0 else r for i, r in enumerate(results) for shape in [_shape0(node)]]


def _shape0(node: Node) -> tuple[int, ...]:
    return tuple(map(hint, node.meta["val"][0].shape))


def attends(sweep: "Sweep", node: Node) -> Any:
    """P·(V·s) = (P·V)·s with s the same for all tokens; under GQA a head's s serves its group of queries."""
    query, key, value, *others = args_of(node)
    for operand in (query, key, *others, *node.kwargs.values()):
        if isinstance(operand, Node):
            pin_operand(sweep, operand, node, "used in the attention scores")
    labels = sweep.labels(value)
    labels = sweep.unify_along(labels, [labels.ndim - 2], node, "differs between tokens")
    results = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else [node.meta["val"]]
    shape = tuple(map(hint, results[0].shape))
    heads = labels.ndim - 3  # below 0 for one head without a dimension of its own
    if heads >= 0 and labels.shape[heads] != shape[heads]:
        one = labels.stride(heads) == 0
        groups = shape[heads] // labels.shape[heads]
        labels = labels.narrow(heads, 0, 1) if one else labels.repeat_interleave(groups, heads)
    output = labels.expand(shape)
    rest = [unscaled(result) for result in results[1:]]
    return [output, *rest] if isinstance(node.meta["val"], tuple | list) else output
