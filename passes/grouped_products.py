"""Products with a stack of matrices: every spelling of experts in one form, `qcompile.grouped_linear`.

transformers sorts tokens by expert and multiplies each expert's rows by its own matrix: by torch's grouped_mm in
bfloat16, by an operator of its own in other dtypes. Both take matrices [E, K, N]; a linear has a weight [N, K].
"""

from typing import Any, cast

import torch
from torch.fx import Node

from qcompile.grouped_ops import grouped_linear
from qcompile.rewrite import Rewriter, args_of, static_nodes

aten = torch.ops.aten

SPELLINGS = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")
EXCHANGED = [0, 2, 1]  # rows and columns of every matrix


def rewrite_grouped(rewriter: Rewriter) -> None:
    """x [S, K] · static matrices [E, K, N], by offsets → grouped_linear(x, weight [E, N, K], offsets)."""
    static = static_nodes(rewriter.gm)
    for node in list(rewriter.gm.graph.nodes):
        if node.op == "call_function" and str(node.target) in SPELLINGS and node not in static:
            x, matrices, offsets, *others = _operands(node)
            plain = isinstance(offsets, Node) and all(other is None for other in others)
            if plain and matrices in static and x.meta["val"].ndim == 2 and matrices.meta["val"].ndim == 3:
                weight = untransposed(rewriter, matrices, node)
                args = (x, weight, offsets)
                linear = rewriter.emit(grouped_linear, args, before=node, of=node, name="grouped_linear")
                rewriter.replace(node, linear)


def _operands(node: Node) -> list[Any]:
    """A call's arguments in the order of its schema; None for what was not given."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return [given.get(name) for name in names]


def untransposed(rewriter: Rewriter, matrices: Node, before: Node) -> Node:
    """Matrices [E, K, N] → [E, N, K]: what they are a transpose of, or a transpose of them."""
    if exchanges(matrices):
        return cast(Node, args_of(matrices)[0])
    args = (matrices, EXCHANGED)
    return rewriter.emit(aten.permute.default, args, before=before, of=matrices, name="weight")


def exchanges(node: Node) -> bool:
    """Whether a node exchanges rows and columns of every matrix of a stack. Capture spells transposes as permute."""
    return node.target is aten.permute.default and [dim % 3 for dim in args_of(node)[1]] == EXCHANGED
