"""smooth: move activation outliers into weights, exactly (SmoothQuant, arXiv:2211.10438).

For any positive s [K]:  x·Wᵀ = (x / s)·(W · s)ᵀ, with s_k = max|x_k|^α / max|W_k|^(1−α) over all linears that share x.

    h = mul(gain, z);  y = linear(h, w)            # fold: the gauge analysis proves gain can take 1/s
    → h = mul(rescale(gain, [1/s]), z);  y = linear(h, rescale(w, [s]))

    y = linear(h, w)                               # absorb: nothing upstream can take it
    → y = linear(rescale(h, [1/s]), rescale(w, [s]))

If asked, s is rounded to a power of two p where it is folded: multiplying by p only moves exponents, so a fold changes
no bit of a float model. What is lost, s / p, is absorbed at run time ("absorb") or given up ("drop").

Folds wherever a component of tied channels is free (passes/gauge.py), compensating every reader, quantized or not.
What cannot be folded is divided at run time; quantize_linears takes that multiplication into the quantize step.
s is an expression over parameters and statistics: it is computed when weights are bound, not here.

Leaves alone, with a Refusal: linears that nothing upstream can absorb for when `absorb` is off; and folds whose tie is
so coarse that one s would serve many channels (multi-query attention), unless nothing else is allowed.
"""

import dataclasses
from collections import defaultdict
from typing import ClassVar, Literal

import numpy as np
import torch
from torch.fx import GraphModule, Node

from qcompile import ops
from qcompile.pass_pipeline import Bound, PassResult
from qcompile.passes.find_linears import bias_of, info_of, linears, parameters_in
from qcompile.passes.gauge import LinearScales, Sweep, Use, analyse
from qcompile.passes.parameters import why_frozen, why_not_copied
from qcompile.passes.scale_variables import Labels
from qcompile.passes.smoothing_groups import SmoothingGroups
from qcompile.passes.smoothing_scales import SmoothingScales
from qcompile.rewrite import Refusal, Rewriter, args_of, input_of, raise_static

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """How the input channels of one linear are smoothed: of `channels`, so many are folded, so many absorbed at run
    time. into: names of the parameters that take the folded 1/s. reason: why not all are folded; empty if they are."""

    channels: int
    folded: int
    absorbed: int
    into: tuple[str, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Smooth:
    """Fold per-channel smoothing scales where that is proved exact, absorb them at run time elsewhere.

    alpha: migration strength in 0…1, or "auto": per group, the one with the least output error on sampled rows.
    absorb: divide at run time where nothing can be folded.
    edit: "use" scales a parameter where it is read; "parameter" only folds what can be written back to parameters.
    power_of_two: round folded scales, and "absorb" or "drop" the rest.
    dtype, activations: what alpha="auto" quantizes to.
    """

    alpha: float | Literal["auto"] = 0.5
    absorb: bool = True
    edit: Literal["use", "parameter"] = "use"
    power_of_two: Literal["off", "absorb", "drop"] = "off"
    dtype: Literal["int8", "fp8", "fp8_e5m2"] = "int8"
    activations: Literal["token", "tensor", "static"] = "token"
    name: ClassVar[str] = "smooth"
    stage: ClassVar[str] = "smoothed"
    bound: ClassVar[Bound] = "exact"

    def run(self, gm: GraphModule) -> PassResult:
        chosen = [node for node in linears(gm) if info_of(node).quantize]
        if not chosen or any("smoothing" in node.meta for node in chosen):
            return PassResult(0)
        raise_static(gm)
        sweep = analyse(gm, why_frozen if self.edit == "parameter" else why_not_copied)
        groups = SmoothingGroups(sweep, chosen)
        edit = _Edit(gm, self, sweep, groups)
        for linear, scales in sweep.linears.items():
            edit.compensate_linear(linear, scales)
        for use in sweep.uses:
            edit.compensate(use)
        if self.absorb:
            edit.absorb(chosen)
        edit.describe(chosen)
        refusals = [
            Refusal(self.name, linear.name, f"{info_of(linear).name}: {reason}")
            for linear in chosen
            if not self.absorb and (reason := groups.why_not(linear))
        ]
        return PassResult(edit.rewriter.changes, tuple(refusals))


class _Edit:
    """Puts scales where the plan says."""

    def __init__(self, gm: GraphModule, step: Smooth, sweep: Sweep, groups: SmoothingGroups) -> None:
        self.groups, self._step = groups, step
        self.rewriter = Rewriter(gm, step.name)
        self._order = {node: position for position, node in enumerate(gm.graph.nodes)}
        anchor = next(n for n in gm.graph.nodes if n.op != "placeholder" and n not in sweep.static)
        self._scales = SmoothingScales(self.rewriter, step, groups, anchor)
        self._into: dict[int, set[str]] = defaultdict(set)

    def compensate(self, use: Use) -> None:
        """A static tensor takes 1/s where it is read, or s where it meets what is divided."""
        static, user = use.static, use.user
        factors = self._inverses(use.labels, static)
        if factors:
            self._remember(use.labels, static)
        if use.divided is not None:
            factors += self._scales.factors(use.divided, static)
        if factors:
            args = (static, factors)
            scaled = self._scales.emit(ops.rescale, args, static, f"{static.name}_smoothed")
            self.rewriter.set_input(user, static, scaled)

    def compensate_linear(self, linear: Node, scales: LinearScales) -> None:
        """W' = W · s[inputs] / s[outputs], b' = b / s[outputs]."""
        rows = self._inverses(scales.outputs, linear)
        columns = self._scales.factors(scales.inputs, linear)
        rows_2d = [self._scales.emit(aten.unsqueeze.default, (row, -1), linear, "rows") for row in rows]
        self._scale_weight(linear, columns + rows_2d)
        if rows:
            self._remember(scales.outputs, self._scales.weight(linear))
        if (bias := bias_of(linear)) is not None and rows:
            scaled = self._scales.emit(ops.rescale, (bias, rows), linear, "bias_smoothed")
            linear.args = (*linear.args[:2], scaled)

    def absorb(self, chosen: list[Node]) -> None:
        """Divide what could not be folded, and what rounding to powers of two left, where the linears read it."""
        readers: dict[Node, list[Node]] = defaultdict(list)
        for linear in chosen:
            readers[args_of(linear)[0]].append(linear)
        for x, siblings in readers.items():
            factors = [self._scales.of_rest(siblings)] if not self.groups.folds(siblings[0]).all() else []
            if self._step.power_of_two == "absorb":
                factors += self._scales.remainders(siblings[0])
            if not factors:
                continue
            inverses = [self._inverse(factor, siblings[0]) for factor in factors]
            first = min(siblings, key=self._order.__getitem__)
            divided = self.rewriter.emit(ops.rescale, (x, inverses), before=first, of=first, name="smoothed")
            for linear in siblings:
                self._scale_weight(linear, factors)
                linear.args = (divided, *linear.args[1:])

    def describe(self, chosen: list[Node]) -> None:
        """Leave a Smoothing on every linear."""
        for linear in chosen:
            folds = self.groups.folds(linear)
            groups = self.groups.indices(np.where(folds, self.groups.roots(linear), 0))
            into = sorted(set().union(*(self._into[group] for group in groups)))
            absorbed = int((~folds).sum()) if self._step.absorb else 0
            reason = self.groups.why_not(linear)
            linear.meta["smoothing"] = Smoothing(folds.size, int(folds.sum()), absorbed, tuple(into), reason)

    def _inverses(self, labels: Labels, of: Node) -> list[Node]:
        return [self._inverse(factor, of) for factor in self._scales.factors(labels, of)]

    def _inverse(self, factor: Node, of: Node) -> Node:
        return self._scales.emit(aten.reciprocal.default, (factor,), of, "inverse")

    def _remember(self, labels: Labels, static: Node) -> None:
        """`static` takes the scales of every group met in labels."""
        for group in self.groups.indices(labels):
            self._into[group].update(input_of(node).name for node in parameters_in(static))

    def _scale_weight(self, linear: Node, factors: list[Node]) -> None:
        if not factors:
            return
        original, weight = self._scales.weight(linear), args_of(linear)[1]
        before = list(weight.args[1]) if weight is not original else []
        scaled = self._scales.emit(ops.rescale, (original, before + factors), linear, "weight_smoothed")
        linear.args = (linear.args[0], scaled, *linear.args[2:])
