"""A captured graph, with the names of its parameters and with who else reads them.

Where Dynamo breaks a model into several graphs, a parameter may be read by more than one of them, and by the code that
runs between them. Such a parameter cannot be scaled in place: a fold is proved on one graph. What counts is memory:
parameters go from graph to graph as views and under other names.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qcompile import names
from qcompile.memory import Span, span_of
from qcompile.rewrite import Input, copy_graph, input_of

CODE, GRAPH, INPUT = "code outside of graphs", "another graph", "another input of its graph"
Reader = tuple[int, int]  # the place of a graph in the call, and of an argument


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


def with_other_readers(captured: Sequence[Captured], outside: "ReadsOutside") -> list[Captured]:
    """The graphs of a call, which know of their parameters who else reads them: code outside, another graph, or another
    input of the same graph (Dynamo reuses a graph for layers that are tied in other ways)."""
    arguments = {(place, index): value for place, one in enumerate(captured) for index, value in _read(one).items()}
    spans: list[tuple[Span, Reader]] = [(span, reader) for reader, v in arguments.items() if (span := span_of(v))]
    others: dict[Reader, str] = {}
    for overlapping in _clusters([*spans, *((span, None) for span in outside.spans)]):
        readers = [reader for reader in overlapping if reader is not None]
        for reader in readers:
            if len(readers) < len(overlapping):
                others[reader] = CODE
            elif len(readers) > 1:
                others[reader] = GRAPH if any(place != reader[0] for place, _ in readers) else INPUT
    others |= {reader: CODE for reader, value in arguments.items() if id(value) in outside.parameters}
    marked = [_with_inputs(one.graph, _marked(one, place, others)) for place, one in enumerate(captured)]
    return [Captured(gm, one.args) for gm, one in zip(marked, captured, strict=True)]


def _read(one: Captured) -> dict[int, Any]:
    """What a graph reads of its arguments, by index."""
    read = [input_of(node).index for node in one.graph.graph.find_nodes(op="placeholder") if node.users]
    return {index: one.args[index] for index in read}


def _marked(one: Captured, place: int, others: Mapping[Reader, str]) -> dict[int, Input]:
    records = [input_of(node) for node in one.graph.graph.find_nodes(op="placeholder")]
    known = {record: others.get((place, record.index), "") for record in records}
    return {record.index: dataclasses.replace(record, also_read_by=other) for record, other in known.items() if other}


def _clusters(spans: list[tuple[Span, Reader | None]]) -> Iterator[list[Reader | None]]:
    """Who reads what overlaps, directly or by way of others."""
    cluster: list[Reader | None] = []
    device, end = "", 0
    for (on, start, stop), reader in sorted(spans, key=lambda pair: pair[0]):
        if (on, start) >= (device, end) or on != device:
            if cluster:
                yield cluster
            cluster, device, end = [], on, stop
        cluster.append(reader)
        end = max(end, stop)
    if cluster:
        yield cluster


def _with_inputs(gm: GraphModule, changed: Mapping[int, Input]) -> GraphModule:
    """A graph that knows other things of its inputs, by index; itself if there are none."""
    if not changed:
        return gm
    copied = copy_graph(gm)
    for node in copied.graph.find_nodes(op="placeholder"):
        node.meta["input"] = changed.get(input_of(node).index, input_of(node))
    return copied


class ReadsOutside(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the block, notes what operators read: the memory of tensors, and which objects parameters are, since code
    may give them other memory. Graphs must run with modes disabled, so that what is seen is the code around them."""

    supports_higher_order_operators = True  # flex_attention, cond: what they are given is looked at

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.spans: set[Span] = set()
        self.parameters: set[int] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Or Dynamo would compile nothing."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.detach.default:  # what reads its result is seen
            for leaf in tree_leaves((args, kwargs)):
                if span := span_of(leaf):
                    self.spans.add(span)
                if isinstance(leaf, nn.Parameter):
                    self.parameters.add(id(leaf))
        return func(*args, **(kwargs or {}))
