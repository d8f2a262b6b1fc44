"""What smoothing did to the channels of every linear, in numbers: needs weights and calibration."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qcompile import ops
from qcompile.calibration import StatisticOf
from qcompile.passes.find_linears import info_of, linears
from qcompile.passes.quantize_linears import peel
from qcompile.rewrite import Input, args_of, input_of
from qcompile.validate import graph_inputs
from qcompile.weights import evaluate

SCALES = (ops.smoothing_scale, ops.search_smoothing_scale)


@dataclasses.dataclass(frozen=True)
class Group:
    """Channels whose smoothing scales are computed together. alpha: None if the search found none worth smoothing."""

    linears: tuple[str, ...]
    components: int
    alpha: float | None


@dataclasses.dataclass(frozen=True)
class Channels:
    """Absolute maxima [K] of the channels of a linear, before and after smoothing, float32; weight_scale: the median
    scale of its quantized rows; alphas: of the groups that it belongs to."""

    x_before: Tensor
    x_after: Tensor
    w_before: Tensor
    w_after: Tensor
    weight_scale: float
    alphas: tuple[float | None, ...]

    @property
    def factor(self) -> float:
        """The largest number that a channel of the input was divided by."""
        ratio = self.x_before / self.x_after
        return float(torch.where(ratio.isfinite(), ratio, 1.0).max())


class ChannelReader:
    """Reads them off a graph after the smoothing pass (or after find_linears, if nothing smooths)."""

    def __init__(self, gm: GraphModule, args: Sequence[Any], statistic: StatisticOf, dtype: torch.dtype) -> None:
        self._gm, self._args, self._statistic, self._dtype = gm, args, statistic, dtype
        self._inputs = graph_inputs(gm, args, statistic)
        records = map(input_of, gm.graph.find_nodes(op="placeholder"))
        self._parameters: dict[int | None, Input] = {record.index: record for record in records}
        self._scales: list[Node] = [node for node in gm.graph.nodes if node.target in SCALES]
        self._known = dict(zip(self._scales, evaluate(gm, self._inputs, self._scales), strict=True))
        self._members: dict[Node, list[str]] = defaultdict(list)
        self._alphas = {scale: self._alpha(scale) for scale in self._scales}

    @torch.no_grad()
    def channels(self) -> dict[str, Channels]:
        """By linear; of a linear that is called several times, its first call."""
        found: dict[str, Channels] = {}
        for linear in linears(self._gm):
            info = info_of(linear)
            if info.quantize and info.parameter is not None:
                scales = self._join(linear)
                if info.name not in found:
                    found[info.name] = self._read(linear, scales)
        return found

    def groups(self) -> list[Group]:
        """After `channels`, which finds their members."""
        sizes = {scale: len(self._known[scale]) - 1 for scale in self._scales}
        return [Group(tuple(self._members[scale]), sizes[scale], self._alphas[scale]) for scale in self._scales]

    def _join(self, linear: Node) -> list[Node]:
        original, _ = peel(args_of(linear)[1])
        scales = [scale for scale in self._scales if original in args_of(scale)[1]]
        for scale in scales:
            if (name := info_of(linear).name) not in self._members[scale]:
                self._members[scale].append(name)
        return scales

    def _read(self, linear: Node, scales: list[Node]) -> Channels:
        weight = args_of(linear)[1]
        original, factors = peel(weight)
        columns = [factor for factor in factors if factor.meta["val"].ndim == 1]
        before, after, *values = evaluate(self._gm, self._inputs, [original, weight, *columns], self._known)
        parameter = self._parameters[info_of(linear).parameter]
        x_before = self._statistic(self._args[parameter.index], parameter.name, "absmax").float()
        x_after = x_before.clone()
        for value in values:
            x_after = x_after / value.to(x_after)
        w_before, w_after = (ops.column_absmax(value).float().cpu() for value in (before, after))
        return Channels(
            x_before.cpu(), x_after.cpu(), w_before, w_after,
            float(ops.row_scale(after, [], self._dtype, None).median()), tuple(self._alphas[scale] for scale in scales),
        )  # fmt: skip

    def _alpha(self, scale: Node) -> float | None:
        if scale.target is ops.smoothing_scale:
            return float(args_of(scale)[4])
        absmax, weights, index, _, components, *_ = args_of(scale)
        flat = evaluate(self._gm, self._inputs, [*absmax, *weights, *index])
        count = len(absmax)
        parts = flat[:count], flat[count : 2 * count], flat[2 * count :]
        for alpha in ops.ALPHAS:
            if torch.equal(ops.smoothing_scale(*parts, components, alpha), self._known[scale]):
                return alpha
        return None


def binned(values: Tensor, bins: int) -> list[float]:
    """At most `bins` maxima of neighbouring channels [K], three significant digits."""
    width = max(1, -(-len(values) // bins))
    return [float(f"{float(part.max()):.3g}") for part in torch.split(values, width)]
