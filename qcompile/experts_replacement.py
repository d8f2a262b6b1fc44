"""Quantize stacks of experts where a quantized graph says they are, one stack at a time.

A float stack is let go before the next one is touched.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from qcompile import ops
from qcompile.grouped_ops import scaled_grouped_mm
from qcompile.linear_replacement import Product, not_finite, products_of, release, weight_of
from qcompile.memory import give_back
from qcompile.parameter_edits import ParameterEdits
from qcompile.passes.find_linears import info_of
from qcompile.quantize_weight import parts, quantize_weight
from qcompile.quantized_experts import become_quantized


class ExpertsReplacement:
    """The stacks that graphs after `passes.storing` quantize."""

    def __init__(self, model: nn.Module, edits: Sequence[ParameterEdits]) -> None:
        self._model = model
        # A module that the model calls several times has several products.
        self._products: dict[str, list[Product]] = {}
        for product in products_of(edits, scaled_grouped_mm):
            self._products.setdefault(info_of(product.node).name, []).append(product)

    def __len__(self) -> int:
        return len(self._products)

    @torch.no_grad()
    def check(self) -> None:
        """Raises WeightError if a stack, or a scale it gets, is not finite. Changes nothing."""
        for name, products in self._products.items():
            weight, factors, dtype, scale_dtype = weight_of(products[0])
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

    def _write(self, name: str, products: Sequence[Product]) -> None:
        weight, factors, dtype, scale_dtype = weight_of(products[0])
        q, scale = quantize_weight(weight, factors, "row", dtype, scale_dtype)
        module, _, stack = name.rpartition(".")
        become_quantized(self._model.get_submodule(module)).put(stack, q.contiguous(), scale.unsqueeze(-1))
        release(products)
