"""Quantize stacks of experts where a quantized graph says they are, one stack at a time.

A float stack is let go before the next one is touched.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.fx import Node

from qcompile import ops
from qcompile.grouped_ops import scaled_grouped_mm
from qcompile.linear_replacement import not_finite, parameter_of, weight_of
from qcompile.memory import give_back
from qcompile.parameter_edits import ParameterEdits
from qcompile.passes.find_linears import info_of
from qcompile.quantize_weight import parts, quantize_weight
from qcompile.quantized_experts import become_quantized


class ExpertsReplacement:
    """The stacks that a graph after `passes.storing` quantizes."""

    def __init__(self, model: nn.Module, edits: ParameterEdits) -> None:
        self._model, self._edits = model, edits
        # A module that the model calls several times has several products.
        products = edits.gm.graph.find_nodes(op="call_function", target=scaled_grouped_mm)
        self._products = {info_of(product).name: product for product in reversed(list(products))}

    def __len__(self) -> int:
        return len(self._products)

    @torch.no_grad()
    def check(self) -> None:
        """Raises WeightError if a stack, or a scale it gets, is not finite. Changes nothing."""
        for name, product in self._products.items():
            weight, factors, dtype, scale_dtype = weight_of(self._edits, product)
            for _, rows, pieces in parts(weight, factors):
                if not bool(torch.isfinite(ops.row_scale(rows, pieces, dtype, scale_dtype)).all()):
                    raise not_finite(name)

    @torch.no_grad()
    def write(self, advance: Callable[[], None] = lambda: None) -> None:
        """Quantize every stack. `advance` is called after each."""
        while self._products:
            name = next(iter(self._products))
            self._write(name, self._products.pop(name))
            give_back()
            advance()

    def _write(self, name: str, product: Node) -> None:
        weight, factors, dtype, scale_dtype = weight_of(self._edits, product)
        q, scale = quantize_weight(weight, factors, "row", dtype, scale_dtype)
        module, _, stack = name.rpartition(".")
        become_quantized(self._model.get_submodule(module)).put(stack, q.contiguous(), scale.unsqueeze(-1))
        self._edits.release(parameter_of(product))
