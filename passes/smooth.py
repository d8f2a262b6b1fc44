"""smooth: move activation outliers into weights, exactly (SmoothQuant, arXiv:2211.10438).

For any positive s [K]:  x·Wᵀ = (x / s)·(W · s)ᵀ, with s_k = max|x_k|^α / max|W_k|^(1−α) over all linears that share x.

    h = mul(gain, z);  y = linear(h, w)            # fold: the gauge analysis proves gain can take 1/s
    → h = mul(rescale(gain, [1/s]), z);  y = linear(h, rescale(w, [s]))

    y = linear(h, w)                               # absorb: nothing upstream can take it
    → y = linear(rescale(h, [1/s]), rescale(w, [s]))

Folds wherever a component of tied channels is free (passes/gauge.py), compensating every reader, quantized or not.
What cannot be folded is divided at run time; quantize_linears takes that multiplication into the quantize step.
s is an expression over parameters and statistics: it is computed when weights are bound, not here.

Leaves alone, with a Refusal: linears that nothing upstream can absorb for when `absorb` is off; and folds whose tie is
so coarse that one s would serve many channels (multi-query attention), unless nothing else is allowed.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch.fx import GraphModule, Node

from qcompile import ops
from qcompile.passes.find_linears import info_of, linears
from qcompile.passes.gauge import LinearScales, Sweep, analyse
from qcompile.passes.parameters import why_frozen
from qcompile.passes.scale_variables import Labels
from qcompile.passes.smoothing_groups import SmoothingGroups
from qcompile.pipeline import Bound, PassResult
from qcompile.rewrite import Refusal, Rewriter, args_of, input_of, raise_static

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Smooth:
    """Fold per-channel smoothing scales where that is proved exact, absorb them at run time elsewhere.

    alpha: migration strength in 0…1. absorb: divide at run time where nothing can be folded.
    edit: "use" scales a parameter where it is read; "parameter" only folds what can be written back to parameters.
    """

    alpha: float = 0.5
    absorb: bool = True
    edit: Literal["use", "parameter"] = "use"
    name: ClassVar[str] = "smooth"
    stage: ClassVar[str] = "smoothed"
    bound: ClassVar[Bound] = "exact"

    def run(self, gm: GraphModule) -> PassResult:
        chosen = [node for node in linears(gm) if info_of(node).quantize]
        if not chosen or any(node.target is ops.smoothing_scale for node in gm.graph.nodes):
            return PassResult(0)
        raise_static(gm)
        sweep = analyse(gm, why_frozen if self.edit == "parameter" else lambda static: "")
        groups = SmoothingGroups(sweep, chosen)
        edit = _Edit(gm, self, sweep, groups)
        for linear, scales in sweep.linears.items():
            edit.compensate_linear(linear, scales)
        for use in sweep.uses:
            edit.compensate(use.static, use.user, use.labels)
        if self.absorb:
            edit.absorb_rest(chosen)
        refusals = [
            Refusal(self.name, linear.name, f"{info_of(linear).name}: {reason}")
            for linear in chosen
            if not self.absorb and (reason := groups.why_not(linear))
        ]
        return PassResult(edit.rewriter.changes, tuple(refusals))


class _Edit:
    """Emits factor expressions and puts them where the plan says."""

    def __init__(self, gm: GraphModule, step: Smooth, sweep: Sweep, groups: SmoothingGroups) -> None:
        self.gm, self.groups, self.alpha = gm, groups, step.alpha
        self.rewriter = Rewriter(gm, step.name)
        static = sweep.static
        self.anchor = next(n for n in gm.graph.nodes if n.op != "placeholder" and n not in static)
        self._cache: dict[Any, Node] = {}

    def _emit(self, target: Any, args: tuple[Any, ...], of: Node, name: str) -> Node:
        """A static node; the same call is emitted once."""
        key = (target, str(args))
        if key not in self._cache:
            self._cache[key] = self.rewriter.emit(target, args, before=self.anchor, of=of, name=name)
        return self._cache[key]

    def _constant(self, index: Labels) -> Node:
        key = (index.shape, index.tobytes())
        if key not in self._cache:
            value = torch.from_numpy(np.array(index, order="C"))
            self._cache[key] = self.rewriter.constant(value, before=self.anchor, name="component")
        return self._cache[key]

    def _scale(self, members: list[Node], indices: list[Labels], components: int) -> Node:
        parameters: dict[int | None, Node] = {input_of(p).index: p for p in self.gm.graph.find_nodes(op="placeholder")}
        absmax = [
            self.rewriter.statistic(parameters[info_of(linear).parameter], index.size)
            for linear, index in zip(members, indices, strict=True)
        ]
        weights = [self._weight(linear) for linear in members]
        index = [self._constant(values) for values in indices]
        args = (absmax, weights, index, components, self.alpha)
        return self._emit(ops.smoothing_scale, args, members[0], "smoothing_scale")

    def _weight(self, linear: Node) -> Node:
        """The weight as the model has it, before this pass scaled it."""
        weight: Node = args_of(linear)[1]
        original: Node = args_of(weight)[0] if weight.target is ops.rescale else weight
        return original

    def _group_scale(self, group: int) -> Node:
        members = self.groups.members[group]
        indices = [self._folded_index(linear, group) for linear in members]
        return self._scale(members, indices, self.groups.sizes[group])

    def _folded_index(self, linear: Node, group: int) -> Labels:
        """Component numbers [K] of a linear's channels; 0 for channels that are not folded."""
        number = self.groups.indices(self.groups.roots(linear))[group]
        return np.where(self.groups.folds(linear), number, 0)

    def _factors(self, labels: Labels, of: Node, *, inverse: bool) -> list[Node]:
        """Factor tensors, shaped like `labels`, whose product is s (or 1/s) at every element."""
        factors = []
        for group, index in self.groups.indices(labels).items():
            factor = self._pick(self._group_scale(group), index, of)
            factors.append(self._emit(aten.reciprocal.default, (factor,), of, "inverse") if inverse else factor)
        return factors

    def _pick(self, scale: Node, index: Labels, of: Node) -> Node:
        return self._emit(aten.index.Tensor, (scale, [self._constant(index)]), of, "factor")

    def compensate(self, static: Node, user: Node, labels: Labels) -> None:
        """A parameter read elementwise by `user` takes 1/s."""
        factors = self._factors(labels, static, inverse=True)
        if factors:
            scaled = self._emit(ops.rescale, (static, factors), static, f"{static.name}_smoothed")
            self.rewriter.set_input(user, static, scaled)

    def compensate_linear(self, linear: Node, scales: LinearScales) -> None:
        """W' = W · s[inputs] / s[outputs], b' = b / s[outputs]."""
        rows = self._factors(scales.outputs, linear, inverse=True)
        columns = self._factors(scales.inputs, linear, inverse=False)
        rows_2d = [self._emit(aten.unsqueeze.default, (row, -1), linear, "rows") for row in rows]
        self._scale_weight(linear, columns + rows_2d)
        if len(linear.args) > 2 and linear.args[2] is not None and rows:
            bias = linear.args[2]
            scaled = self._emit(ops.rescale, (bias, rows), linear, "bias_smoothed")
            linear.args = (*linear.args[:2], scaled)

    def _scale_weight(self, linear: Node, factors: list[Node]) -> None:
        if not factors:
            return
        weight = args_of(linear)[1]
        before = list(weight.args[1]) if weight.target is ops.rescale else []
        args = (self._weight(linear), before + factors)
        scaled = self._emit(ops.rescale, args, linear, "weight_smoothed")
        linear.args = (linear.args[0], scaled, *linear.args[2:])

    def absorb_rest(self, chosen: list[Node]) -> None:
        """Divide what could not be folded where the linears read it."""
        readers: dict[Node, list[Node]] = {}
        for linear in chosen:
            if not self.groups.folds(linear).all():
                readers.setdefault(args_of(linear)[0], []).append(linear)
        for x, siblings in readers.items():
            rest = ~self.groups.folds(siblings[0])
            index = np.where(rest, np.cumsum(rest), 0)
            scale = self._scale(siblings, [index] * len(siblings), int(rest.sum()))
            factor = self._pick(scale, index, siblings[0])
            inverse = self._emit(aten.reciprocal.default, (factor,), siblings[0], "inverse")
            first = min(siblings, key=lambda node: list(self.gm.graph.nodes).index(node))
            divided = self.rewriter.emit(ops.rescale, (x, [inverse]), before=first, of=first, name="smoothed")
            for linear in siblings:
                self._scale_weight(linear, [factor])
                linear.args = (divided, *linear.args[1:])
