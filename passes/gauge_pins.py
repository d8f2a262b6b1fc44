"""The transfer rule that is always right, and pinning of single operands. See gauge_rules.py for the notation."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompile.passes.scale_variables import ones
from qcompile.rewrite import hint

if TYPE_CHECKING:
    from qcompile.passes.gauge import Sweep


def pin_all(sweep: "Sweep", node: Node) -> Any:
    """f(1·x) = 1·f(x): an op without an identity sees only unscaled values."""
    what = "returned from the model" if node.op == "output" else "no scale passes through"
    for operand in node.all_input_nodes:
        pin_operand(sweep, operand, node, what)
    # A pinned variable is 1 like ONE, and tells whoever asks about this result which op was in the way.
    pinned = torch.from_numpy(sweep.variables.fresh(1)).squeeze()
    sweep.pin(pinned, node, what)

    def result(value: Any) -> Tensor | None:
        return pinned.expand(tuple(map(hint, value.shape))) if isinstance(value, Tensor) else None

    value = node.meta.get("val")
    return [result(item) for item in value] if isinstance(value, list | tuple) else result(value)


def pin_operand(sweep: "Sweep", operand: Node, node: Node, what: str) -> None:
    meaning = sweep.results(operand)
    for labels in meaning if isinstance(meaning, list) else [meaning]:
        if isinstance(labels, Tensor):
            sweep.pin(labels, node, what)


def unscaled(value: Any) -> Tensor | None:
    return ones(tuple(map(hint, value.shape))) if isinstance(value, Tensor) else None
