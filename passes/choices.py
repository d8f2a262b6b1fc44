"""Which linears make a choice: a router picks experts by their largest outputs.

A rounding may change what is picked, and then everything after it; and routers are small. So they stay in float, as
every engine that reads W8A8 checkpoints expects of them.
"""

import torch
from torch import Tensor
from torch.fx import Node

from qcompile.rewrite import module_of

aten = torch.ops.aten
CHOICES = (
    aten.topk.default,
    aten.argmax.default,
    aten.argmin.default,
    aten.max.dim,
    aten.sort.default,
    aten.sort.stable,
    aten.argsort.default,
    aten.argsort.stable,
)
# Ops that keep the order of a row's entries, or nearly so, and are not tagged as pointwise.
ORDERED = (aten._softmax.default, aten._log_softmax.default, aten.softmax.int, aten.log_softmax.int)


def choice_of(linear: Node, static: set[Node]) -> str:
    """The module in which entries are picked by the size of a linear's outputs; empty if that happens nowhere.

    Followed through views, casts, softmax and pointwise ops of the outputs with one another and with static tensors.
    """
    reached, pending = {linear}, list(linear.users)
    while pending:
        node = pending.pop()
        if node.target in CHOICES:
            return module_of(node) or node.name
        tensors = [o for o in node.all_input_nodes if isinstance(o.meta.get("val"), Tensor)]
        kept = _keeps_places(node) and all(tensor in reached or tensor in static for tensor in tensors)
        if kept and node not in reached:
            reached.add(node)
            pending.extend(node.users)
    return ""


def _keeps_places(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    schema = getattr(node.target, "_schema", None)
    views = schema is not None and any(value.alias_info is not None for value in schema.returns)
    casts = node.target in (aten._to_copy.default, torch.ops.prims.convert_element_type.default)
    return views or casts or node.target in ORDERED or torch.Tag.pointwise in tags
