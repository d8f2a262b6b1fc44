"""On GPUs, count for all layers in one kernel.

    copy_(n₀, n₀ + 1);  copy_(n₁, n₁ + 1);  …   →   m = _foreach_add([n₀, n₁, …], 1);  copy_(n₀, m₀);  copy_(n₁, m₁);  …

A static cache of transformers keeps a count of tokens in every layer. Inductor makes a kernel of each, which takes a
microsecond for one number; of a `_foreach_add` it makes one for all.
"""

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qcompile.rewrite import is_symbolic

aten = torch.ops.aten


def merge_counters(gm: GraphModule) -> GraphModule:
    """The same graph, edited in place."""
    alike: dict[Any, list[Node]] = {}
    for copy in gm.graph.find_nodes(op="call_function", target=aten.copy_.default):
        if _counts(copy):
            counter, amount = copy.args[1].args
            value = counter.meta["val"]
            alike.setdefault((value.dtype, value.device, amount), []).append(copy)
    for (_, _, amount), copies in alike.items():
        if len(copies) > 1:
            _merge(gm, copies, amount)
    gm.recompile()
    return gm


def _counts(copy: Node) -> bool:
    """Whether a write to an input adds a number to the one that is in it."""
    counter, source = copy.args[:2]
    if not (isinstance(counter, Node) and isinstance(source, Node) and counter.op == "placeholder"):
        return False
    added = source.target is aten.add.Tensor and source.args[0] is counter and not source.kwargs
    one = not is_symbolic(counter) and counter.meta["val"].numel() == 1
    return added and one and type(source.args[1]) is int


def _merge(gm: GraphModule, copies: list[Node], amount: int) -> None:
    sums = [copy.args[1] for copy in copies]
    with gm.graph.inserting_before(copies[0]):
        together = gm.graph.call_function(aten._foreach_add.Scalar, ([copy.args[0] for copy in copies], amount))
        together.meta["val"] = [added.meta["val"] for added in sums]  # type: ignore[union-attr]
        for at, (copy, added) in enumerate(zip(copies, sums, strict=True)):
            assert isinstance(added, Node)
            new = gm.graph.call_function(operator.getitem, (together, at))
            new.meta = dict(added.meta)
            copy.replace_input_with(added, new)
            if not added.users:
                gm.graph.erase_node(added)
