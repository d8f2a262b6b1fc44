"""Scale variables and what is known of them: a union-find over arrays, with the reason for every pin.

A label is an integer. ONE (0) means "this element is not scaled", ANY (−1) "this element is zero, so any scale fits",
and every other label is a variable: an unknown positive factor. Equal variables are united; a variable that must be 1
is pinned, and remembers why.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ONE, ANY = 0, -1
Labels = NDArray[np.int64]


class ScaleVariables:
    """A growing set of variables under equality and pinning. All operations take whole label arrays."""

    def __init__(self) -> None:
        self._parent: Labels = np.zeros(1024, np.int64)
        self._reason: Labels = np.full(1024, -1, np.int64)
        self._used = 1  # variable 0 is ONE
        self.reasons: list[str] = []

    @property
    def size(self) -> int:
        """One more than the largest label."""
        return self._used

    def fresh(self, count: int) -> Labels:
        """`count` new variables, equal to nothing yet."""
        start, self._used = self._used, self._used + count
        while self._used > len(self._parent):
            grown = len(self._parent)
            self._parent = np.concatenate([self._parent, np.zeros(grown, np.int64)])
            self._reason = np.concatenate([self._reason, np.full(grown, -1, np.int64)])
        variables = np.arange(start, self._used)
        self._parent[start : self._used] = variables
        return variables

    def find(self, labels: Labels) -> Labels:
        """The representative of each label; ONE and ANY stand for themselves."""
        index = np.maximum(labels, ONE)
        parents = roots = self._parent[index]
        while not np.array_equal(above := self._parent[roots], roots):
            roots = above
        if roots is not parents:
            self._parent[index] = roots
        return np.where(labels == ANY, ANY, roots)

    def free(self, labels: Labels) -> NDArray[np.bool_]:
        """Where the label is a variable that nothing has pinned."""
        return self._unpinned(self.find(labels))

    def _unpinned(self, roots: Labels) -> NDArray[np.bool_]:
        return (roots > ONE) & (self._reason[np.maximum(roots, ONE)] < 0)

    def pin(self, labels: Labels, reason: str) -> None:
        """These must be 1, because of `reason`. The first reason a variable gets is kept."""
        roots = self.find(labels)
        roots = np.unique(roots[self._unpinned(roots)])
        if roots.size:
            self.reasons.append(reason)
            self._reason[roots] = len(self.reasons) - 1

    def reason(self, label: int) -> str:
        """Why a label is pinned; empty if it is free."""
        root = int(self.find(np.array([label]))[0])
        index = int(self._reason[max(root, 0)])
        return self.reasons[index] if index >= 0 else ""

    def unify(self, left: Labels, right: Labels, reason: str) -> None:
        """Elementwise equality. Meeting ONE pins; meeting ANY says nothing."""
        left, right = np.broadcast_arrays(left, right)
        said = (left != ANY) & (right != ANY)
        left, right = left[said], right[said]
        self.pin(left[right == ONE], reason)
        self.pin(right[left == ONE], reason)
        both = (left != ONE) & (right != ONE)
        self._union(left[both], right[both])

    def _union(self, left: Labels, right: Labels) -> None:
        carried: list[Labels] = []
        while left.size:
            a, b = self.find(left), self.find(right)
            differ = a != b
            if not differ.any():
                break
            left, right, a, b = left[differ], right[differ], a[differ], b[differ]
            low, high = np.minimum(a, b), np.maximum(a, b)
            self._parent[high] = low  # of several partners the last wins; the others meet it next round
            carried.append(high[self._reason[high] >= 0])
        for pinned in carried:
            roots = self.find(pinned)
            unexplained = self._reason[roots] < 0
            self._reason[roots[unexplained]] = self._reason[pinned[unexplained]]


def compact(labels: Tensor, *others: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Drop the extent of dimensions along which every tensor repeats itself (stride 0).

    All tensors have one shape. Labels hardly ever differ between tokens, so this is what keeps the analysis'
    cost independent of batch and sequence. Returns the narrowed tensors and the full shape.
    """
    tensors = (labels, *others)
    shape = tuple(labels.shape)
    for dim in range(labels.ndim):
        if shape[dim] > 1 and all(tensor.stride(dim) == 0 for tensor in tensors):
            tensors = tuple(tensor.narrow(dim, 0, 1) for tensor in tensors)
    return tensors, shape


def elementwise(function: Callable[..., Labels], *labels: Tensor) -> Tensor:
    """Apply an array function to labels broadcast against each other."""
    broadcast = torch.broadcast_tensors(*labels)  # type: ignore[no-untyped-call]
    narrowed, shape = compact(*broadcast)
    result = function(*(tensor.numpy() for tensor in narrowed))
    return torch.from_numpy(np.array(result, order="C")).expand(shape)


def ones(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros((), dtype=torch.int64).expand(shape)
