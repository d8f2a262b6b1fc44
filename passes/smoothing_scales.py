"""The expressions for smoothing scales: static nodes over weights and calibration statistics.

Per group of tied channels one vector s [components + 1], whose entry 0 is 1: index 0 means "not scaled". A tensor that
is to be scaled picks its entries by a constant index. The same expression is emitted once.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.fx import Node

from qcompile import ops
from qcompile.calibration import Field
from qcompile.passes.find_linears import info_of
from qcompile.passes.scale_variables import Labels
from qcompile.passes.smoothing_groups import SmoothingGroups
from qcompile.rewrite import Rewriter, args_of, input_of

if TYPE_CHECKING:
    from qcompile.passes.smooth import Smooth

aten = torch.ops.aten
MODES = {"token": "row", "tensor": "tensor", "static": "static"}


class SmoothingScales:
    """Emits scales for one run of the smooth pass."""

    def __init__(self, rewriter: Rewriter, step: "Smooth", groups: SmoothingGroups, anchor: Node) -> None:
        """anchor: the node in front of which expressions are put."""
        self._rewriter, self._step, self._groups, self._anchor = rewriter, step, groups, anchor
        self._cache: dict[Any, Node] = {}
        self._weights: dict[Node, Node] = {}
        placeholders = rewriter.gm.graph.find_nodes(op="placeholder")
        self._parameters: dict[int | None, Node] = {input_of(node).index: node for node in placeholders}

    def emit(self, target: Any, args: tuple[Any, ...], of: Node, name: str) -> Node:
        """A static node; the same call is emitted once."""
        key = (target, str(args))
        if key not in self._cache:
            self._cache[key] = self._rewriter.emit(target, args, before=self._anchor, of=of, name=name)
        return self._cache[key]

    def factors(self, labels: Labels, of: Node) -> list[Node]:
        """Factor tensors, shaped like `labels`, whose product is the folded scale at every element."""
        indices = self._groups.indices(labels).items()
        return [self._pick(self._folded(group), index, of) for group, index in indices]

    def remainders(self, linear: Node) -> list[Node]:
        """Factors [K] that make the wanted scale of a linear's folded channels out of the rounded one."""
        indices = self._groups.indices(self._groups.roots(linear))
        factors = []
        for group in indices:
            whole, index = self._group(group), self._folded_index(linear, group)
            if index.any():
                remainder = self.emit(aten.div.Tensor, (whole, self._folded(group)), linear, "remainder")
                factors.append(self._pick(remainder, index, linear))
        return factors

    def of_rest(self, siblings: list[Node]) -> Node:
        """A factor [K] for the channels that are not folded of linears that read one tensor."""
        rest = ~self._groups.folds(siblings[0])
        index = np.where(rest, np.cumsum(rest), 0)
        scale = self._scale(siblings, [index] * len(siblings), int(rest.sum()))
        return self._pick(scale, index, siblings[0])

    def weight(self, linear: Node) -> Node:
        """The weight as the model has it, before this pass scaled it."""
        return self._weights.setdefault(linear, args_of(linear)[1])

    def _folded(self, group: int) -> Node:
        scale = self._group(group)
        if self._step.power_of_two == "off":
            return scale
        return self.emit(ops.power_of_two, (scale,), scale, "power_of_two")

    def _group(self, group: int) -> Node:
        if group not in self._cache:
            members = self._groups.members[group]
            indices = [self._folded_index(linear, group) for linear in members]
            self._cache[group] = self._scale(members, indices, self._groups.sizes[group])
        return self._cache[group]

    def _folded_index(self, linear: Node, group: int) -> Labels:
        """Component numbers [K] of a linear's channels; 0 for channels that are not folded."""
        number = self._groups.indices(self._groups.roots(linear))[group]
        return np.where(self._groups.folds(linear), number, 0)

    def _scale(self, members: list[Node], indices: list[Labels], components: int) -> Node:
        absmax = [self._statistic(linear, "absmax") for linear in members]
        weights = [self.weight(linear) for linear in members]
        index = [self._constant(values, weight) for values, weight in zip(indices, weights, strict=True)]
        if self._step.alpha != "auto":
            args: tuple[Any, ...] = (absmax, weights, index, components, self._step.alpha)
            return self.emit(ops.smoothing_scale, args, members[0], "smoothing_scale")
        rows = [self._statistic(linear, "rows") for linear in members]
        dtype = ops.TORCH_DTYPES[self._step.dtype]
        args = (absmax, weights, index, rows, components, MODES[self._step.activations], dtype)
        return self.emit(ops.search_smoothing_scale, args, members[0], "smoothing_scale")

    def _statistic(self, linear: Node, field: Field) -> Node:
        parameter = self._parameters[info_of(linear).parameter]
        key = (parameter, field)
        if key not in self._cache:
            channels = args_of(linear)[0].meta["val"].shape[-1]
            self._cache[key] = self._rewriter.statistic(parameter, channels, field)
        return self._cache[key]

    def _constant(self, index: Labels, beside: Node) -> Node:
        """A constant index, on the device of what it is used with."""
        device = beside.meta["val"].device
        key = (index.shape, index.tobytes(), device)
        if key not in self._cache:
            value = torch.from_numpy(np.array(index, order="C")).to(device)
            self._cache[key] = self._rewriter.constant(value, before=self._anchor, name="component")
        return self._cache[key]

    def _pick(self, scale: Node, index: Labels, of: Node) -> Node:
        return self.emit(aten.index.Tensor, (scale, [self._constant(index, scale)]), of, "factor")
