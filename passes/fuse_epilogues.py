"""fuse_epilogues: what follows a GEMM elementwise becomes part of it.

    y = scaled_mm(…, bias, None, None);  z = relu(y)        →   z = scaled_mm(…, bias, None, "relu")
    y = scaled_mm(…);                    z = add(y, r)      →   z = scaled_mm(…, residual=r)

and the same of from_sums, where a product's sums come from several processes. The sum stays in float32 until the one
rounding to the output dtype, so the result is at least as accurate. Applies when the GEMM's result has that one reader.
Leaves alone additions that broadcast, scale or change the dtype, and float64, which would be rounded to float32.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch._prims_common import is_contiguous_or_false
from torch.fx import GraphModule, Node

from qcompile import ops
from qcompile.pass_pipeline import Bound, PassResult
from qcompile.rewrite import Rewriter, args_of

aten = torch.ops.aten
# What has an epilogue: its last arguments are residual, activation and out_dtype.
PRODUCTS = (ops.scaled_mm, ops.from_sums)


@dataclasses.dataclass(frozen=True)
class FuseEpilogues:
    """Move activation and residual addition into scaled_mm."""

    name: ClassVar[str] = "fuse_epilogues"
    stage: ClassVar[str] = "quantized"
    bound: ClassVar[Bound] = "exact"

    def run(self, gm: GraphModule) -> PassResult:
        rewriter = Rewriter(gm, self.name)
        for node in list(gm.graph.nodes):
            fused = _fuse(node)
            if fused is not None:
                product, args = fused
                new = rewriter.emit(product.target, args, before=node, of=product, name=_name(product))
                rewriter.replace(node, new)
                gm.graph.erase_node(product)
        return PassResult(rewriter.changes)


def _fuse(node: Node) -> tuple[Node, tuple[Any, ...]] | None:
    """The product that can swallow `node`, and its new arguments."""
    activation = _activation(node)
    if activation is not None:
        product = _sole_product(node.args[0])
        if product is not None and product.args[-3] is None and product.args[-2] is None:
            return product, (*product.args[:-2], activation, product.args[-1])
    if node.target is aten.add.Tensor and not node.kwargs:
        left, right = args_of(node)
        for operand, residual in ((left, right), (right, left)):
            product = _sole_product(operand)
            if product is not None and product.args[-3] is None and _same_kind(product, residual, node):
                return product, (*product.args[:-3], residual, *product.args[-2:])
    return None


def _activation(node: Node) -> str | None:
    if node.target is aten.relu.default:
        return "relu"
    if node.target is aten.silu.default:
        return "silu"
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return None


def _sole_product(node: Any) -> Node | None:
    is_product = isinstance(node, Node) and node.target in PRODUCTS and len(node.users) == 1
    return node if is_product and node.args[-1] != torch.float64 else None


def _name(product: Node) -> str:
    return "scaled_mm" if product.target is ops.scaled_mm else "from_sums"


def _same_kind(product: Node, residual: Any, total: Node) -> bool:
    if not isinstance(residual, Node) or residual is product:
        return False
    values: list[Any] = [node.meta.get("val") for node in (product, residual, total)]
    if not all(isinstance(value, torch.Tensor) for value in values):
        return False
    # scaled_mm's result is contiguous; a sum that took other strides from its residual has readers that rely on them.
    kinds = {(tuple(map(str, value.shape)), value.dtype) for value in values}
    return len(kinds) == 1 and is_contiguous_or_false(values[2])
