"""merge_siblings: one GEMM for the linears that read one quantized tensor.

    a = scaled_mm(q, w1, s, ws1, …) [.., N1];  b = scaled_mm(q, w2, s, ws2, …) [.., N2]
    → y = scaled_mm(q, concatenate(w1, w2), s, concatenate(ws1, ws2), …) [.., N1+N2];  a, b = split(y, [N1, N2])

The concatenated weight is static: made once, and the parts are not kept. Leaves alone, with a Refusal: siblings of
which only some have a bias, and readers that need a contiguous tensor where a slice is none. Parts that the model
returns are copied, so that callers get the layout they had.
"""

import dataclasses
import itertools
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from qcompile import ops
from qcompile.pass_pipeline import Bound, PassResult
from qcompile.rewrite import Refusal, Rewriter, args_of, fake_mode_of, is_view, raise_static

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class MergeSiblings:
    """Merge linears that read the same quantized tensor into one GEMM."""

    name: ClassVar[str] = "merge_siblings"
    stage: ClassVar[str] = "quantized"
    bound: ClassVar[Bound] = "exact"

    def run(self, gm: GraphModule) -> PassResult:
        rewriter = Rewriter(gm, self.name)
        reasons = [(siblings, _refuse(gm, siblings)) for siblings in _siblings(gm)]
        merged = [siblings for siblings, reason in reasons if not reason]
        if merged:
            raise_static(gm)  # the merged GEMM stands where the first sibling did, above the others' weights
        for siblings in merged:
            _merge(rewriter, siblings)
        refusals = [Refusal(self.name, siblings[0].name, reason) for siblings, reason in reasons if reason]
        return PassResult(rewriter.changes, tuple(refusals))


def _siblings(gm: GraphModule) -> list[list[Node]]:
    groups: dict[Any, list[Node]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=ops.scaled_mm):
        x, _, x_scale, _, _, residual, activation, out_dtype = node.args
        if residual is None and activation is None:
            groups.setdefault((x, x_scale, out_dtype), []).append(node)
    return [group for group in groups.values() if len(group) > 1]


def _refuse(gm: GraphModule, siblings: list[Node]) -> str:
    if len({node.args[4] is None for node in siblings}) > 1:
        return "some of the linears that read one tensor have a bias and some have none"
    total = sum(_columns(node) for node in siblings)
    with fake_mode_of(gm):
        for node in siblings:
            if _escapes(node):
                continue  # becomes a copy
            value = node.meta["val"]
            whole = value.new_empty((*value.shape[:-1], total))
            if not _accepts(node, whole.narrow(-1, 0, _columns(node))):
                return "a reader of one of them views its result in a way that a slice does not allow"
    return ""


def _accepts(node: Node, value: torch.Tensor) -> bool:
    """Whether every view of `node` can also be taken of `value`, a slice with other strides."""
    for user in node.users:
        if not is_view(user):
            continue
        if user.target is aten.as_strided.default:
            return False  # it counts in storage elements, and would read its siblings' columns
        view: Any = user.target
        args = torch.fx.node.map_arg(user.args[1:], lambda n: n.meta["val"])
        try:
            viewed = view(value, *args)
        except (RuntimeError, ValueError):  # fake views raise either
            return False
        if not _accepts(user, viewed):
            return False
    return True


def _escapes(node: Node) -> bool:
    """Whether a caller gets this tensor or a view of it: contiguous as it was, and without its siblings' memory."""
    return any(user.op == "output" or (is_view(user) and _escapes(user)) for user in node.users)


def _columns(node: Node) -> int:
    return int(args_of(node)[1].meta["val"].shape[0])


def _merge(rewriter: Rewriter, siblings: list[Node]) -> None:
    first = siblings[0]

    def emit(target: Any, args: tuple[Any, ...], name: str) -> Node:
        return rewriter.emit(target, args, before=first, of=first, name=name)

    weight = emit(ops.concatenate, ([node.args[1] for node in siblings],), "weights")
    scale = emit(ops.concatenate, ([node.args[3] for node in siblings],), "weight_scales")
    biased = first.args[4] is not None
    bias = emit(ops.concatenate, ([node.args[4] for node in siblings],), "biases") if biased else None
    x, _, x_scale, _, _, _, _, out_dtype = first.args
    merged = emit(ops.scaled_mm, (x, weight, x_scale, scale, bias, None, None, out_dtype), "scaled_mm")
    ends = list(itertools.accumulate(map(_columns, siblings), initial=0))
    parts = [emit(aten.slice.Tensor, (merged, -1, a, b), "part") for a, b in itertools.pairwise(ends)]
    copied = [
        emit(aten.clone.default, (part,), "part") if _escapes(node) else part
        for node, part in zip(siblings, parts, strict=True)
    ]
    for node, part in zip(siblings, copied, strict=True):
        rewriter.replace(node, part)
