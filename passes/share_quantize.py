"""share_quantize: linears that read one tensor read one quantized copy of it.

    q1, s1 = quantize(h, [], "row", int8);  q2, s2 = quantize(h, [], "row", int8)   →   one quantize, both read it

Applies to calls of the dialect with identical arguments; leaves alone any that differ in tensor, factors or mode.
"""

import dataclasses
import operator
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from qcompile import ops
from qcompile.pass_pipeline import Bound, PassResult
from qcompile.rewrite import Rewriter

SHARED = (
    ops.quantize,
    ops.quantize_static,
    ops.static_scale,
    ops.clipped_static_scale,
    ops.rescale,
    torch.ops.aten.reciprocal.default,
    operator.getitem,
)


@dataclasses.dataclass(frozen=True)
class ShareQuantize:
    """Merge identical quantize steps."""

    name: ClassVar[str] = "share_quantize"
    stage: ClassVar[str] = "quantized"
    bound: ClassVar[Bound] = "exact"

    def run(self, gm: GraphModule) -> PassResult:
        rewriter = Rewriter(gm, self.name)
        seen: dict[tuple[object, str], Node] = {}
        for node in list(gm.graph.nodes):
            if node.target in SHARED:
                first = seen.setdefault((node.target, str(node.args)), node)
                if first is not node:
                    rewriter.replace(node, first)
        return PassResult(rewriter.changes)
