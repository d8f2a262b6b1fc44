"""Lowering: replace the dialect by implementations for one target, and decompose the rest as Inductor wants it."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from qcompile import ops, products
from qcompile.lowering import attention_cpu
from qcompile.lowering.select import INLINED, select_accumulate, select_scaled_mm
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import Table
from qcompile.rewrite import fake_mode_of, input_of, static_nodes

VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def lower(
    gm: GraphModule,
    target: Target,
    decompositions: dict[Any, Callable[..., Any]],
    measured: Table | None = None,
) -> tuple[GraphModule, dict[str, str]]:
    """A graph of ATen ops and kernels, with the same inputs and outputs, and what each product became.

    The target need not be this machine. measured: tiles that the user measured. Static dialect nodes (weight
    quantization, smoothing scales) stay: they run once, when weights are bound.
    """
    interpreter = _Lowering(gm, target, measured)
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    fakes = [node.meta["val"] for node in placeholders]
    constants = [node for node in gm.graph.find_nodes(op="get_attr") if "val" in node.meta]

    def run(*args: Any) -> Any:
        interpreter.constants = dict(zip(constants, args[len(placeholders) :], strict=True))
        return interpreter.run(*args[: len(placeholders)])

    with fake_mode_of(gm), preserve_node_meta(), enable_python_dispatcher():
        trace = make_fx(run, decomposition_table=decompositions, _allow_non_fake_inputs=True)
        lowered = trace(*fakes, *(node.meta["val"] for node in constants))
    inputs = list(lowered.graph.find_nodes(op="placeholder"))
    for old, new in zip(placeholders, inputs[: len(placeholders)], strict=True):
        new.meta["input"] = input_of(old)
        new.meta["val"] = old.meta["val"]
    _restore_constants(gm, lowered, dict(zip(constants, inputs[len(placeholders) :], strict=True)))
    return lowered, interpreter.chosen


def _restore_constants(gm: GraphModule, lowered: GraphModule, inputs: dict[Node, Node]) -> None:
    """Constants went through the trace as inputs, so that tracing would not swap them for fake tensors."""
    for old, placeholder in inputs.items():
        name = str(old.target).replace(".", "_")
        lowered.register_buffer(name, operator.attrgetter(str(old.target))(gm), persistent=False)
        with lowered.graph.inserting_before(placeholder):
            constant = lowered.graph.get_attr(name)
        constant.meta = {**old.meta}
        placeholder.replace_all_uses_with(constant)
        lowered.graph.erase_node(placeholder)
    lowered.recompile()


class _Lowering(Interpreter):
    """Runs the graph on fake values, calling implementations where it says a dialect op."""

    def __init__(self, gm: GraphModule, target: Target, measured: Table | None) -> None:
        super().__init__(gm)
        self.target, self.measured, self.static = target, measured, static_nodes(gm)
        self.chosen: dict[str, str] = {}
        self.constants: dict[Node, Any] = {}
        self._node: Node | None = None

    def run_node(self, n: Node) -> Any:
        self._node = n
        return self.constants[n] if n in self.constants else super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        node = self._node
        assert node is not None
        if node in self.static:
            return super().call_function(target, args, kwargs)
        if target in VIEWS:  # a merged sibling's result is a slice, which reshape takes and view may not
            return torch.ops.aten.reshape.default(*args)
        if target is ops.scaled_mm:
            implementation, _ = select_scaled_mm(self.target, args[0], args[1])
            self.chosen[node.name] = implementation.name
            return implementation.bound(self.target, self.measured)(*args)
        if target is ops.accumulate:
            implementation, _ = select_accumulate(self.target, args[0], args[1])
            assert implementation.accumulate is not None
            self.chosen[node.name] = implementation.name
            return products.sums_of(implementation.accumulate)(*args)
        if target is attention_cpu.ATTENTION:
            return attention_cpu.lowered(self.target, node, args, kwargs)
        if target in INLINED:
            return INLINED[target](*args)
        return super().call_function(target, args, kwargs)
