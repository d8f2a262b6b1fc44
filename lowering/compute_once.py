"""On GPUs, compute cosines and sines that several kernels read once.

    cos = to(cos(position · frequency), bf16);  layer: q · cos + …   →   kept = as_strided(cos, …);  layer: q · kept + …

Inductor computes anew, in each kernel that reads it, whatever is made of few numbers. A decoder's rotation is made of
two, and every layer so computes a cosine and a sine for each element of its queries and keys: more work than all else
that these kernels do. as_strided wants memory, so Inductor writes it.
"""

import torch
from torch.fx import GraphModule, Node

from qcompile.rewrite import is_symbolic, is_view

aten = torch.ops.aten
COSTLY = (aten.cos.default, aten.sin.default)
# What usually stands between a cosine and its readers.
ONWARD = (
    torch.ops.prims.convert_element_type.default, aten.mul.Tensor, aten._to_copy.default, aten.clone.default,
    aten.cat.default,
)  # fmt: skip


def compute_once(gm: GraphModule) -> GraphModule:
    """The same graph, edited in place: what COSTLY operators make is kept where it has several readers."""
    kept = {_fan_out(node) for node in gm.graph.nodes if node.target in COSTLY}
    for node in kept:
        if len(node.users) > 1 and node.target is not aten.as_strided.default and not is_symbolic(node):
            _keep(gm, node)
    if kept:
        gm.recompile()
    return gm


def _fan_out(node: Node) -> Node:
    """The last of the values that a node's only reader makes of it, and that reader's, and so on."""
    while len(node.users) == 1:
        (reader,) = node.users
        if reader.target not in ONWARD and not is_view(reader):
            break
        node = reader
    return node


def _keep(gm: GraphModule, node: Node) -> None:
    value = node.meta["val"]
    with gm.graph.inserting_after(node):
        kept = gm.graph.call_function(aten.as_strided.default, (node, list(value.shape), list(value.stride())))
    kept.meta = {**node.meta}
    node.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)
