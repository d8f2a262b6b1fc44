"""On GPUs, compute once what several kernels read: cosines and sines, and masks of attention.

    cos = to(cos(position · frequency), bf16);  layer: q · cos …   →   kept = as_strided(clone(cos));  layer: q · kept …

Inductor computes anew, in each kernel that reads it, whatever is made of few numbers. A decoder's rotation is made of
two, and every layer so computes a cosine and a sine for each element of its queries and keys: more work than all else
that these kernels do. For a kernel that is not its own, Inductor even writes what is read to memory each time.
as_strided wants memory, once; the clone before it lies there as its strides say, whatever a view of computed values is.
"""

from typing import Any

import torch
from torch.fx import GraphModule, Node

from qcompile.rewrite import args_of, fake_value, is_symbolic, is_view

aten = torch.ops.aten
COSTLY = (aten.cos.default, aten.sin.default)
# What usually stands between a cosine and its readers.
ONWARD = (
    torch.ops.prims.convert_element_type.default, aten.mul.Tensor, aten._to_copy.default, aten.clone.default,
    aten.cat.default,
)  # fmt: skip
ATTENTION, MASK = "qcompile_triton.attention.default", 3


def compute_once(gm: GraphModule) -> GraphModule:
    """The same graph, edited in place, before kernels are opened up."""
    for node in dict.fromkeys(_fan_out(node) for node in gm.graph.nodes if node.target in COSTLY):
        value = node.meta["val"]
        if len(node.users) > 1 and not is_symbolic(node) and value.is_contiguous() and not _is_kept(node):
            _keep(gm, node, list(node.users))
    readers: dict[Node, list[Node]] = {}
    for call in gm.graph.nodes:
        if str(call.target) == ATTENTION and args_of(call)[MASK] is not None:
            readers.setdefault(args_of(call)[MASK], []).append(call)
    for mask, calls in readers.items():
        if _base(mask).op == "call_function" and not is_symbolic(mask) and not _is_kept(mask):
            _keep(gm, mask, calls)
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


def _base(node: Node) -> Node:
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def _is_kept(node: Node) -> bool:
    return node.target is aten.as_strided.default


def _keep(gm: GraphModule, node: Node, readers: list[Node]) -> None:
    """Let readers read a copy of a value, row by row in memory."""
    dense = _after(gm, node, node, aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    value = dense.meta["val"]
    kept = _after(gm, dense, node, aten.as_strided.default, (dense, list(value.shape), list(value.stride())), {})
    for reader in readers:
        reader.replace_input_with(node, kept)


def _after(gm: GraphModule, place: Node, source: Node, target: Any, args: Any, keywords: dict[str, Any]) -> Node:
    with gm.graph.inserting_after(place):
        node = gm.graph.call_function(target, args, keywords)
    node.meta = {**source.meta, "val": fake_value(gm, target, args, keywords)}
    return node
