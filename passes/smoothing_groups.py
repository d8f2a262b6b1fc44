"""Which channels share one smoothing scale, and which linears decide it.

The gauge analysis yields components of tied channels. Components that meet in one linear are computed together, as one
group, so that a linear's input has one vector of scales. Within a group components are numbered 1…n; 0 stands for
"not scaled".
"""

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from qcompile.passes.gauge import Sweep
from qcompile.passes.scale_variables import ANY, ONE, Labels
from qcompile.rewrite import args_of

# A fold must leave at least this share of the channels a factor of their own: four query heads to a KV head is the
# usual grouped-query ratio and still smooths well, one head's worth for all of them (multi-query) does not.
FINEST_TIE = 1 / 8
NO_GROUP = -1


class SmoothingGroups:
    """The groups that a set of linears asks for.

    members: per group, the linears whose channels and statistics decide its scales. sizes: its number of components.
    """

    def __init__(self, sweep: Sweep, chosen: list[Node]) -> None:
        self._sweep = sweep
        self._folds: dict[Node, NDArray[np.bool_]] = {}
        self._group = np.full(sweep.variables.size, NO_GROUP)
        self._same: list[int] = []  # union-find over groups met so far
        asked: list[tuple[Node, int]] = []
        for linear in chosen:
            roots = np.unique(self.roots(linear)[self.folds(linear)])
            if roots.size:
                asked.append((linear, self._join(roots)))
        self._settle()
        self.members: list[list[Node]] = [[] for _ in self.sizes]
        for linear, group in asked:
            self.members[self._final[self._find(group)]].append(linear)

    def roots(self, linear: Node) -> Labels:
        """Per input channel [K]: the representative of its scale."""
        if linear not in self._sweep.linears:
            return np.full(args_of(linear)[1].meta["val"].shape[-1], ONE)
        return self._sweep.variables.find(self._sweep.linears[linear].inputs)

    def folds(self, linear: Node) -> NDArray[np.bool_]:
        """Per input channel [K]: whether its scale is folded."""
        if linear not in self._folds:
            roots = self.roots(linear)
            free = self._sweep.variables.free(roots)
            self._folds[linear] = free & (np.unique(roots[free]).size >= FINEST_TIE * roots.size)
        return self._folds[linear]

    def indices(self, labels: Labels) -> dict[int, Labels]:
        """For each group met in `labels`: every element's component number in it, 0 where it has none."""
        roots = self._sweep.variables.find(labels)
        groups = np.where(roots > 0, self._group[np.maximum(roots, 0)], NO_GROUP)
        numbers = self._number[np.maximum(roots, 0)]
        return {
            group: np.where(groups == group, numbers, 0) for group in np.unique(groups).tolist() if group != NO_GROUP
        }

    def why_not(self, linear: Node) -> str:
        """Why a linear's input is not folded whole; empty if it is."""
        kept = ~self.folds(linear)
        if not kept.any():
            return ""
        if linear not in self._sweep.linears:
            return "one scale of all its channels passes through it, its bias is computed, or a size depends on data"
        label = int(self.roots(linear)[kept][0])
        if label in (ONE, ANY):
            return "nothing before its input can take a scale"
        reason = self._sweep.variables.reason(label)
        return reason or "its channels are tied so coarsely that one scale would serve too many"

    def _join(self, roots: Labels) -> int:
        """One group for these components and for every group they are in already."""
        met = {self._find(group) for group in np.unique(self._group[roots]).tolist() if group != NO_GROUP}
        if not met:
            met = {len(self._same)}
            self._same.append(len(self._same))
        first = min(met)
        for group in met:
            self._same[group] = first
        self._group[roots] = first
        return first

    def _find(self, group: int) -> int:
        while self._same[group] != group:
            group = self._same[group]
        return group

    def _settle(self) -> None:
        """Number the groups that are left, and the components within each."""
        heads = sorted({self._find(group) for group in range(len(self._same))})
        self._final = {head: number for number, head in enumerate(heads)}
        final = np.array([self._final[self._find(group)] for group in range(len(self._same))] + [NO_GROUP])
        self._group = final[self._group]
        self._number = np.zeros_like(self._group)
        self.sizes = np.bincount(self._group[self._group != NO_GROUP], minlength=len(heads)).tolist()
        order = np.argsort(self._group, kind="stable")
        order = order[self._group[order] != NO_GROUP]
        starts = np.cumsum([0, *self.sizes])[self._group[order]]
        self._number[order] = np.arange(order.size) - starts + 1
