"""A captured graph, with the names of its parameters and with who else reads them.

Where Dynamo breaks a model into several graphs, a parameter may be read by more than one of them, and by the code that
runs between them. Such a parameter cannot be scaled in place: a fold is proved on one graph.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qcompile import names
from qcompile.rewrite import Input, copy_graph, input_of

aten = torch.ops.aten
CODE, GRAPH = "code outside of graphs", "another graph"


@dataclasses.dataclass(frozen=True)
class Captured:
    """A captured graph and the arguments it was captured with."""

    graph: GraphModule
    args: list[Any]


def named_after(traced: GraphModule, args: Sequence[Any]) -> GraphModule:
    """A traced graph with the names of these parameters: Dynamo reuses a graph for every layer that looks like the
    first."""
    renamed = {}
    for node in traced.graph.find_nodes(op="placeholder"):
        record = input_of(node)
        if record.kind == "parameter" and (live := names.names_of(args[record.index])) not in ((), record.names):
            renamed[record.index] = dataclasses.replace(record, name=live[0], aliases=live[1:])
    return _with_inputs(traced, renamed)


def with_other_readers(captured: Sequence[Captured], outside: set[int]) -> list[Captured]:
    """The graphs of a call, which know of their parameters whether another of them, or code outside, reads them too.

    outside: memories that code outside graphs read, as of ReadsOutside.
    """
    graphs: Counter[int] = Counter()
    for one in captured:
        graphs.update(set(_memories_read(one).values()))
    return [Captured(_with_inputs(one.graph, _marked(one, graphs, outside)), one.args) for one in captured]


def _marked(one: Captured, graphs: Mapping[int, int], outside: set[int]) -> dict[int, Input]:
    records = {record.index: record for record in map(input_of, one.graph.graph.find_nodes(op="placeholder"))}
    found = {}
    for index, memory in _memories_read(one).items():
        if memory in outside:
            found[index] = dataclasses.replace(records[index], also_read_by=CODE)
        elif graphs[memory] > 1:
            found[index] = dataclasses.replace(records[index], also_read_by=GRAPH)
    return found


def _memories_read(one: Captured) -> dict[int, int]:
    """The memory of every tensor that a graph reads, by the index of its argument."""
    read = [input_of(node).index for node in one.graph.graph.find_nodes(op="placeholder") if node.users]
    return {index: _memory(one.args[index]) for index in read if _has_memory(one.args[index])}


def _with_inputs(gm: GraphModule, changed: Mapping[int, Input]) -> GraphModule:
    """A graph that knows other things of its inputs, by index; itself if there are none."""
    if not changed:
        return gm
    copied = copy_graph(gm)
    for node in copied.graph.find_nodes(op="placeholder"):
        node.meta["input"] = changed.get(input_of(node).index, input_of(node))
    return copied


class ReadsOutside(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the block, `memories` become those of a model's parameters that operators read. Graphs must run with
    modes disabled, so that what is seen is the code around them."""

    supports_higher_order_operators = True  # flex_attention, cond: what they are given is looked at

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own = {_memory(parameter) for parameter in model.parameters() if _has_memory(parameter)}
        self.memories: set[int] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Or Dynamo would compile nothing."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not aten.detach.default:  # which Dynamo does to every parameter; what reads its result is seen
            self.memories |= self._own & {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if _has_memory(leaf)}
        return func(*args, **(kwargs or {}))


def _has_memory(value: object) -> bool:
    return isinstance(value, Tensor) and torch._C._has_storage(value)


def _memory(tensor: Tensor) -> int:
    """What tensors have in common that share their memory."""
    return int(tensor.untyped_storage()._cdata)
