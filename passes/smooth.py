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
from qcompile.passes.scale_variables import ANY, ONE, Labels
from qcompile.pipeline import Bound, PassResult
from qcompile.rewrite import Refusal, Rewriter, args_of, input_of, raise_static

aten = torch.ops.aten
# A fold must leave at least this share of the channels a factor of their own: four query heads to a KV head is the
# usual grouped-query ratio and still smooths well, one head's worth for all of them (multi-query) does not.
FINEST_TIE = 1 / 8


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
        plan = _Plan(sweep, chosen)
        edit = _Edit(gm, self, plan)
        for linear, scales in sweep.linears.items():
            edit.compensate_linear(linear, scales)
        for use in sweep.uses:
            edit.compensate(use.static, use.user, use.labels)
        if self.absorb:
            edit.absorb_rest(chosen)
        refusals = [] if self.absorb else plan.refusals(self.name)
        return PassResult(edit.rewriter.changes, tuple(refusals))


class _Plan:
    """Which components are scaled: numbered 1…n within groups that share a linear."""

    def __init__(self, sweep: Sweep, chosen: list[Node]) -> None:
        self.sweep, self.chosen = sweep, chosen
        self._group_of: dict[int, int] = {}
        self.members: list[list[Node]] = []
        for linear in chosen:
            self._join(linear, np.unique(self.roots(linear)[self.folds(linear)]))
        self.components = [
            np.array(sorted(root for root, group in self._group_of.items() if group == index), np.int64)
            for index in range(len(self.members))
        ]

    def roots(self, linear: Node) -> Labels:
        """Per input channel [K]: the representative of its scale."""
        if linear not in self.sweep.linears:
            return np.full(args_of(linear)[1].meta["val"].shape[1], ONE)
        return self.sweep.variables.find(self.sweep.linears[linear].inputs)

    def folds(self, linear: Node) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """Per input channel [K]: whether its scale is folded."""
        if linear not in self.sweep.linears:
            return np.zeros(args_of(linear)[1].meta["val"].shape[1], np.bool_)
        inputs = self.sweep.linears[linear].inputs
        free = self.sweep.variables.free(inputs)
        distinct = np.unique(self.roots(linear)[free]).size
        return free & (distinct >= FINEST_TIE * inputs.size)

    def _join(self, linear: Node, roots: Labels) -> None:
        if not roots.size:
            return
        met = sorted({self._group_of[root] for root in roots.tolist() if root in self._group_of})
        group = met[0] if met else len(self.members)
        if not met:
            self.members.append([])
        for other in met[1:]:
            self.members[group] += self.members[other]
            self.members[other] = []
            self._group_of.update({root: group for root, old in self._group_of.items() if old == other})
        self._group_of.update(dict.fromkeys(roots.tolist(), group))
        self.members[group].append(linear)

    def indices(self, labels: Labels) -> dict[int, Labels]:
        """For each group met in `labels`: every element's component number in it, 0 where it has none."""
        roots = self.sweep.variables.find(labels)
        groups = {self._group_of[root] for root in np.unique(roots).tolist() if root in self._group_of}
        return {group: _number(roots, self.components[group]) for group in sorted(groups)}

    def refusals(self, rule: str) -> list[Refusal]:
        return [
            Refusal(rule, linear.name, f"{info_of(linear).name}: {self._why(linear)}")
            for linear in self.chosen
            if not self.folds(linear).all()
        ]

    def _why(self, linear: Node) -> str:
        if linear not in self.sweep.linears:
            return "its weight is not [N, K], its bias is computed, or a size depends on data"
        label = int(self.roots(linear)[~self.folds(linear)][0])
        if label in (ONE, ANY):
            return "nothing before its input can take a scale"
        reason = self.sweep.variables.reason(label)
        return reason or "its channels are tied so coarsely that one scale would serve too many"


def _number(roots: Labels, components: Labels) -> Labels:
    position = np.searchsorted(components, roots).clip(max=components.size - 1)
    return np.where(components[position] == roots, position + 1, 0)


class _Edit:
    """Emits factor expressions and puts them where the plan says."""

    def __init__(self, gm: GraphModule, step: Smooth, plan: _Plan) -> None:
        self.gm, self.plan, self.alpha = gm, plan, step.alpha
        self.rewriter = Rewriter(gm, step.name)
        static = plan.sweep.static
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
            value = torch.from_numpy(np.ascontiguousarray(index))
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
        members, components = self.plan.members[group], self.plan.components[group]
        indices = [
            np.where(self.plan.folds(linear), _number(self.plan.roots(linear), components), 0) for linear in members
        ]
        return self._scale(members, indices, components.size)

    def _factors(self, labels: Labels, of: Node, *, inverse: bool) -> list[Node]:
        """Factor tensors, shaped like `labels`, whose product is s (or 1/s) at every element."""
        factors = []
        for group, index in self.plan.indices(labels).items():
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
            if not self.plan.folds(linear).all():
                readers.setdefault(args_of(linear)[0], []).append(linear)
        for x, siblings in readers.items():
            rest = ~self.plan.folds(siblings[0])
            index = np.where(rest, np.cumsum(rest), 0)
            scale = self._scale(siblings, [index] * len(siblings), int(rest.sum()))
            factor = self._pick(scale, index, siblings[0])
            inverse = self._emit(aten.reciprocal.default, (factor,), siblings[0], "inverse")
            first = min(siblings, key=lambda node: list(self.gm.graph.nodes).index(node))
            divided = self.rewriter.emit(ops.rescale, (x, [inverse]), before=first, of=first, name="smoothed")
            for linear in siblings:
                self._scale_weight(linear, [factor])
                linear.args = (divided, *linear.args[1:])
