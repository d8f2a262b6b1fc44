"""Products with matrices gathered from a stack, one for each row: experts as transformers' `batched_mm` writes them.

    matrices: f32[S, N, K] = index(weight, [experts]);  y: f32[S, N, 1] = bmm(matrices, unsqueeze(x, -1))
    → order = sort(experts);  y = unsqueeze(grouped_linear(x[order], weight, offsets)[sort(order)], -1)

Sorted by expert, rows meet matrices where they lie: no copy of float matrices for each row, and one form for every
spelling of experts. Also for matrices [S, K, N] on the right of unsqueeze(x, 1). Leaves alone products whose gathered
matrix meets several rows.
"""

import dataclasses

import torch
from torch.fx import Node

from qcompile.grouped_ops import grouped_linear
from qcompile.passes.grouped_products import exchanges, untransposed
from qcompile.rewrite import Rewriter, args_of, equal, static_nodes

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class _Routing:
    """Which rows are whose. order: rows sorted by expert; places: where each row went; offsets: see grouped_ops."""

    order: Node
    places: Node
    offsets: Node


def rewrite_gathered(rewriter: Rewriter) -> None:
    """x [S, K] · static matrices gathered from [E, N, K] by experts [S] → grouped_linear on sorted rows."""
    static = static_nodes(rewriter.gm)
    routings: dict[tuple[Node, int], _Routing] = {}
    for node in rewriter.gm.graph.find_nodes(op="call_function", target=aten.bmm.default):
        left, right = args_of(node)
        for rows, matrices, dim in ((right, left, -1), (left, right, 1)):
            found = _gathered(matrices, static)
            if found is not None and equal(rows.meta["val"].shape[dim], 1):
                weight, experts = found
                is_linear = (dim == -1) != (matrices.target is aten.permute.default)  # [.., N, K] lies in memory
                if not is_linear:
                    weight = untransposed(rewriter, weight, node)
                key = experts, weight.meta["val"].shape[0]
                if key not in routings:
                    routings[key] = _routing(rewriter, *key, node)
                _to_grouped(rewriter, node, rows, dim, weight, routings[key])
                break


def _gathered(matrices: Node, static: set[Node]) -> tuple[Node, Node] | None:
    """The static stack and the experts [S] that matrices, or what they are a transpose of, were gathered by."""
    source: Node = args_of(matrices)[0] if exchanges(matrices) else matrices
    if source.target is not aten.index.Tensor or source in static:
        return None
    stack, indices = args_of(source)
    if stack not in static or len(indices) != 1:
        return None
    value = indices[0].meta["val"]
    return (stack, indices[0]) if value.ndim == 1 and value.dtype in (torch.int32, torch.int64) else None


def _routing(rewriter: Rewriter, experts: Node, count: int, before: Node) -> _Routing:
    def emit(name: str, target: object, *args: object, **keywords: object) -> Node:
        return rewriter.emit(target, args, keywords, before=before, of=before, name=name)

    def item(node: Node, index: int, name: str) -> Node:
        return rewriter.item(node, index, before=before, name=name)

    counted = emit("experts", aten.remainder.Scalar, experts, count)  # as index counts those below zero
    by_expert = emit("sort", aten.sort.default, counted)
    order = item(by_expert, 1, "order")
    numbers = emit("numbers", aten.arange.default, count, device=experts.meta["val"].device)
    ends = emit("offsets", aten.searchsorted.Tensor, item(by_expert, 0, "sorted"), numbers, out_int32=True, right=True)
    return _Routing(order, item(emit("sort", aten.sort.default, order), 1, "places"), ends)


def _to_grouped(rewriter: Rewriter, node: Node, rows: Node, dim: int, weight: Node, routing: _Routing) -> None:
    def emit(name: str, target: object, *args: object) -> Node:
        return rewriter.emit(target, args, before=node, of=node, name=name)

    x = emit("rows", aten.index.Tensor, emit("x", aten.squeeze.dim, rows, dim), [routing.order])
    y = emit("grouped_linear", grouped_linear, x, weight, routing.offsets)
    placed = emit("placed", aten.index.Tensor, y, [routing.places])
    rewriter.replace(node, emit("y", aten.unsqueeze.default, placed, dim))
