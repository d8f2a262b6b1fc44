"""Lowering: replace the dialect by implementations for one target, and decompose the rest as Inductor wants it.

An operator that becomes others is traced on its own, once for all calls with operands of the same sizes, layouts and
dtypes: layers of a decoder call the same few, and tracing takes long. Calls are then written out one by one, values are
computed anew, and every node says the truth about layout and shared memory.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings
from torch.fx.node import map_arg

from qcompile import ops, products
from qcompile.grouped_ops import scaled_grouped_mm
from qcompile.lowering.attention import attention
from qcompile.lowering.select import inlined, select_accumulate, select_scaled_grouped_mm, select_scaled_mm
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import Table
from qcompile.rewrite import fake_mode_of, operands_in, static_nodes, value_kind

VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
KEPT = ("stack_trace", "nn_module_stack", "original_aten")  # metadata that Inductor names kernels and errors by


def lower(
    gm: GraphModule,
    target: Target,
    decompositions: dict[Any, Callable[..., Any]],
    measured: Table | None = None,
) -> tuple[GraphModule, dict[str, str]]:
    """A graph of ATen ops and kernels, with the same inputs and outputs, and what each scaled_mm became.

    The target need not be this machine. measured: tiles that the user measured. Static dialect nodes (weight
    quantization, smoothing scales) stay: they run once, when weights are bound.
    """
    lowering = _Lowering(gm, target, decompositions, measured)
    with lowering.fake_mode, enable_python_dispatcher():
        return lowering.run(), lowering.chosen


class _Lowering:
    """Writes a new graph, node by node."""

    def __init__(
        self, gm: GraphModule, target: Target, decompositions: dict[Any, Callable[..., Any]], measured: Table | None
    ) -> None:
        self.gm, self.target, self.decompositions, self.measured = gm, target, decompositions, measured
        self.fake_mode, self.static = fake_mode_of(gm), static_nodes(gm)
        self.chosen: dict[str, str] = {}
        self._graph, self._root = Graph(), torch.nn.Module()
        self._new: dict[Node, Any] = {}  # what stands for a node: a node, or several for one that yields several
        self._traced: dict[Hashable, tuple[GraphModule, str]] = {}

    def run(self) -> GraphModule:
        for node in self.gm.graph.nodes:
            if node.op == "output":
                self._graph.output(map_arg(node.args[0], self._new.__getitem__)).meta = dict(node.meta)
            elif node.op == "call_function":
                self._new[node] = self._call(node)
            else:
                self._new[node] = self._copied(node)
        return GraphModule(self._root, self._graph)

    def _copied(self, node: Node) -> Node:
        """A placeholder or a constant."""
        if node.op == "get_attr":
            return self._constant(self.gm, str(node.target), node.meta)
        copy = self._graph.node_copy(node)
        copy.meta = dict(node.meta)
        return copy

    def _constant(self, owner: torch.nn.Module, name: str, meta: dict[str, Any]) -> Node:
        value: Any = owner
        for part in name.split("."):
            value = getattr(value, part)
        own = f"constant_{len(self._root._buffers) + len(self._root._modules)}"
        if isinstance(value, torch.nn.Module):
            self._root.add_module(own, value)
        else:
            self._root.register_buffer(own, value, persistent=False)
        constant = self._graph.get_attr(own)
        constant.meta = dict(meta)
        return constant

    def _call(self, node: Node) -> Any:
        """What a call becomes: a node, or the nodes of its several results."""
        meta = {key: node.meta[key] for key in KEPT if key in node.meta}
        first = self._new.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
        if isinstance(first, tuple | list):  # getitem, of several
            return first[node.args[1]]  # type: ignore[index]
        args, kwargs = map_arg((node.args, node.kwargs), self._new.__getitem__)
        if not self._becomes_others(node):
            return self._emit(node.target, args, kwargs, meta, node.meta.get("val"))
        operands = list(dict.fromkeys(operands_in((args, kwargs))))
        body, chosen = self._body(node, args, kwargs, operands)
        if chosen:
            self.chosen[node.name] = chosen
        return self._write_out(body, operands, meta)

    def _becomes_others(self, node: Node) -> bool:
        target = node.target
        if target in ops.REFERENCES:
            return node not in self.static
        if not isinstance(target, OpOverload):
            return isinstance(target, HigherOrderOperator)
        return target in self.decompositions or target in VIEWS or target._can_decompose()

    def _body(self, node: Node, args: Any, kwargs: Any, operands: list[Node]) -> tuple[GraphModule, str]:
        """A call's implementation as a graph over its operands, and its name if it is one of several."""
        place = {operand: f"%{index}" for index, operand in enumerate(operands)}
        call = map_arg((args, kwargs), lambda operand: _Named(place[operand]))
        kinds = tuple(value_kind(operand.meta.get("val")) for operand in operands)
        key = (node.target, repr(call), kinds)
        if isinstance(node.target, HigherOrderOperator) or key not in self._traced:
            self._traced[key] = self._trace(node, args, kwargs, operands)
        return self._traced[key]

    def _trace(self, node: Node, args: Any, kwargs: Any, operands: list[Node]) -> tuple[GraphModule, str]:
        function, chosen = self._implementation(node, args)
        values = [operand for operand in operands if "val" in operand.meta]

        def call(*found: Any) -> Any:
            value = dict(zip(values, found, strict=True))
            given = map_arg(
                (args, kwargs), lambda operand: value[operand] if operand in value else self._module(operand)
            )
            return function(*given[0], **given[1])

        trace = make_fx(call, decomposition_table=self.decompositions, _allow_non_fake_inputs=True)
        return trace(*(operand.meta["val"] for operand in values)), chosen

    def _module(self, constant: Node) -> Any:
        """A subgraph that a higher-order operator calls."""
        return getattr(self._root, str(constant.target))

    def _implementation(self, node: Node, args: Any) -> tuple[Callable[..., Any], str]:
        target: Any = node.target
        if target in VIEWS:  # a merged sibling's result is a slice, which reshape takes and view may not
            return torch.ops.aten.reshape.default, ""
        if target is ops.scaled_mm:
            implementation, _ = select_scaled_mm(self.target, args[0].meta["val"], args[1].meta["val"])
            return implementation.bound(self.target, self.measured), implementation.name
        if target is scaled_grouped_mm:
            implementation, _ = select_scaled_grouped_mm(self.target, args[0].meta["val"], args[1].meta["val"][0])
            return implementation.bound(self.target, self.measured), implementation.name
        if target is ops.accumulate:
            implementation, _ = select_accumulate(self.target, args[0].meta["val"], args[1].meta["val"])
            assert implementation.accumulate is not None
            return products.sums_of(implementation.accumulate), implementation.name
        if target is ops.attention:
            return functools.partial(attention, self.target), ""
        return inlined(self.target, target), ""

    def _write_out(self, body: GraphModule, operands: list[Node], meta: dict[str, Any]) -> Any:
        """The body's nodes, on these operands."""
        operands = [operand for operand in operands if "val" in operand.meta]
        new: dict[Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
        for node in body.graph.nodes:
            if node.op == "get_attr":
                new[node] = self._constant(body, str(node.target), node.meta)
            elif node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), new.__getitem__)
                own = {key: node.meta[key] for key in KEPT if key in node.meta}
                new[node] = self._emit(node.target, args, kwargs, own | meta, node.meta.get("val"))
            elif node.op == "output":
                return map_arg(node.args[0], new.__getitem__)
        raise AssertionError("a traced graph has an output")

    def _emit(self, target: Any, args: Any, kwargs: Any, meta: dict[str, Any], seen: Any) -> Node:
        """One node. seen: its value where it was traced, which serves where it cannot be computed from operands."""
        node = self._graph.call_function(target, args, kwargs)
        node.meta = dict(meta)
        value = seen if isinstance(target, HigherOrderOperator) else self._value(target, args, kwargs)
        if value is not None:
            node.meta["val"] = value
        if bindings := compute_unbacked_bindings(self.fake_mode.shape_env, value):
            node.meta["unbacked_bindings"] = bindings
        return node

    def _value(self, target: Any, args: Any, kwargs: Any) -> Any:
        given, named = map_arg((args, kwargs), lambda operand: operand.meta["val"])
        return target(*given, **named)


class _Named(str):
    """Prints without quotes inside nested argument lists."""

    def __repr__(self) -> str:
        return str(self)
