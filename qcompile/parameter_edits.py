"""Carry out what passes wrote into a graph on the model's own parameters, one parameter at a time.

Smoothing scales are vectors: they are computed first, from the parameters as they are. What is left then depends on one
parameter each, so nothing but that parameter is ever held twice. Every new value is checked before the first is
written.

A gain that is stored as g and used as 1 + g (Gemma) is special: (1 + g) / s − 1 lies near −1 where s is large, and its
rounding to 16 bits is large beside (1 + g) / s: a fifth of it at s = 100. Any positive s is as exact as any other, so
such gains are rounded first, and s becomes what they can store: s' = (1 + g) / (1 + g').
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qcompile import names, ops
from qcompile.calibration import StatisticOf, as_input
from qcompile.errors import CaptureError, WeightError
from qcompile.memory import give_back
from qcompile.passes.parameters import Source, source_of
from qcompile.rewrite import args_of, input_of
from qcompile.weights import evaluate

SCALES = (ops.smoothing_scale, ops.search_smoothing_scale, ops.static_scale, ops.clipped_static_scale)


class ParameterEdits:
    """The edits in one smoothed graph, its captured arguments, and where statistics come from."""

    def __init__(self, gm: GraphModule, args: Sequence[Any], statistic: StatisticOf) -> None:
        self.gm, self.args = gm, list(args)
        self._inputs: list[Any] = [self._input(node, statistic) for node in gm.graph.find_nodes(op="placeholder")]
        scales = [node for node in gm.graph.nodes if node.target in SCALES and node.users]
        self._known: dict[Node, Any] = {}
        for scale in scales:
            (self._known[scale],) = self.values([scale])
            give_back()  # a search for one scale leaves many small holes
        self._edits = [node for node in gm.graph.find_nodes(op="call_function", target=ops.rescale) if node.users]
        self._settle()

    def values(self, nodes: Sequence[Node]) -> list[Any]:
        """Values of nodes that depend on parameters and statistics alone."""
        return evaluate(self.gm, self._inputs, nodes, self._known)

    def check(self) -> None:
        """Raises WeightError or CaptureError if an edit cannot be written. Changes nothing."""
        for parameter, value in self._new_values():
            check_memory(parameter)
            if not bool(torch.isfinite(value).all()):
                raise WeightError(
                    f"a smoothed parameter must stay finite; {name_of(parameter)} does not fit its dtype; nothing was "
                    "changed; use another alpha, or load the model in bfloat16 or float32"
                )

    def write(self) -> None:
        """Scale the parameters in place."""
        with torch.no_grad():
            for parameter, value in self._new_values():
                parameter.copy_(value)

    def release(self, index: int) -> None:
        """Let go of the captured argument at an index: nothing will be computed from it any more."""
        for position, node in enumerate(self.gm.graph.find_nodes(op="placeholder")):
            record = input_of(node)
            if record.kind != "statistic" and record.index == index:
                self._inputs[position] = None
        self.args[index] = None

    def _settle(self) -> None:
        """Make scales what shifted parameters can store. A component serves the first of them."""
        settled: set[tuple[Node, int]] = set()
        for edit in self._edits:
            base, inverses = args_of(edit)
            source, scale = source_of(base), _scale_of(inverses)
            if isinstance(source, str) or not source.shifted or scale not in self._known:
                continue
            storable = self._storable(edit, base, source)
            (component,) = self.values([args_of(args_of(inverses[0])[0])[1][0]])
            refined = self._known[scale].clone()
            for index, value in zip(component.flatten().tolist(), storable.flatten().tolist(), strict=True):
                if index and value > 0 and (scale, index) not in settled:
                    settled.add((scale, index))
                    refined[index] = value
            self._known[scale] = refined

    def _storable(self, edit: Node, base: Node, source: Source) -> Tensor:
        """The scales nearest to those wanted that a parameter can express; not positive where there is none."""
        wanted, exact, old = self.values([edit, base, source.parameter])
        stored = source.undo(wanted).to(old.dtype)
        vanishes = stored == source.undo(torch.zeros_like(wanted)).to(old.dtype)
        stored = torch.where(vanishes, torch.nextafter(stored, old), stored)
        found = exact.double() / self._from_parameter(base, source.parameter, stored).double()
        return torch.where(torch.isfinite(found), found, 0.0)

    def _from_parameter(self, static: Node, parameter: Node, value: Tensor) -> Tensor:
        """A static tensor as it would be computed from another value of its parameter."""
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        inputs = [value if node is parameter else old for node, old in zip(placeholders, self._inputs, strict=True)]
        found: Tensor
        (found,) = evaluate(self.gm, inputs, [static])
        return found

    def _new_values(self) -> Iterator[tuple[Tensor, Tensor]]:
        for edit in self._edits:
            source = source_of(args_of(edit)[0])
            if isinstance(source, str):
                raise CaptureError(f"a folded scale must reach one parameter; {source}")
            (value,) = self.values([edit])
            yield self.args[input_of(source.parameter).index], source.undo(value)

    def _input(self, node: Node, statistic: StatisticOf) -> Any:
        record = input_of(node)
        if record.of is None:
            return self.args[record.index]
        weight = self.args[record.of]
        return as_input(statistic(weight, names.name_of(weight) or record.name, record.field), weight)


def _scale_of(inverses: Sequence[Node]) -> Node | None:
    """The scale that 1/s is the only factor of, each element picked from it."""
    if len(inverses) != 1 or args_of(inverses[0])[0].target is not torch.ops.aten.index.Tensor:
        return None
    scale: Node = args_of(args_of(inverses[0])[0])[0]
    return scale


def check_memory(parameter: Tensor) -> None:
    """Raises CaptureError for a parameter that cannot be written to: expanded, or made in inference mode."""
    if any(stride == 0 and size > 1 for stride, size in zip(parameter.stride(), parameter.shape, strict=True)):
        raise CaptureError(
            f"a parameter that is scaled in place must have memory for every element; {name_of(parameter)} is "
            "expanded; nothing was changed; make it contiguous"
        )
    if parameter.is_inference():
        raise CaptureError(
            f"a parameter that is scaled in place must be writable; {name_of(parameter)} was made in inference mode; "
            "nothing was changed; load the model outside torch.inference_mode()"
        )


def name_of(tensor: Tensor) -> str:
    """A tensor's name for messages."""
    return names.name_of(tensor) or f"a tensor {list(tensor.shape)}"
