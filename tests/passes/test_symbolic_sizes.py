"""Which reshapes mean the same at every size, checked against labels that are laid out at many sizes."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from qcompile.passes.symbolic_sizes import constant_factor, must_agree

Size = int | torch.SymInt
Shapes = Callable[[Size, Size], tuple[list[Size], list[Size]]]


def symbols(b: int = 2, s: int = 6) -> tuple[torch.SymInt, torch.SymInt]:
    environment = ShapeEnv()
    made = []
    for name, hint in (("b", b), ("s", s)):
        source = ConstantSource(name)
        symbol = environment.create_symbol(hint, source, DimDynamic.DYNAMIC)
        size = environment.create_symintnode(symbol, hint=hint, source=source)
        assert isinstance(size, torch.SymInt)
        made.append(size)
    return made[0], made[1]


def test_the_constant_factor_of_a_size() -> None:
    b, s = symbols()
    assert [constant_factor(size) for size in (s, 8 * s, b * 4 * s, s + 8, 2 * s + 2, s * s)] == [1, 8, 4, 1, 1, 1]
    assert constant_factor(s // 2) == 1


# Shapes before and after, and the dimensions along which labels must agree.
FREE: tuple[list[int], list[int]] = ([], [])
EXPECTED: dict[str, tuple[Shapes, tuple[list[int], list[int]]]] = {
    "fixed": (lambda b, s: ([2, 6, 16], [12, 4, 4]), FREE),
    "unchanged": (lambda b, s: ([b, s, 16], [b, s, 16]), FREE),
    "heads": (lambda b, s: ([b, s, 16], [b, s, 4, 4]), FREE),
    "a new dimension": (lambda b, s: ([b, s, 16], [b, 1, s, 16]), FREE),
    "tokens merged": (lambda b, s: ([b, s, 16], [b * s, 16]), ([0], [])),
    "tokens taken apart": (lambda b, s: ([b * s, 16], [b, s, 4, 4]), ([], [0])),
    "batch and heads merged": (lambda b, s: ([b, 4, s, 8], [4 * b, s, 8]), FREE),
    "batch and heads taken apart": (lambda b, s: ([4 * b, s, 8], [b, 4, s, 8]), FREE),
    "fixed batch and heads merged": (lambda b, s: ([2, 4, s, 8], [8, s, 8]), FREE),
    "heads and tokens merged": (lambda b, s: ([b, 4, s, 8], [b, 4 * s, 8]), ([1], [])),
    "half tokens": (lambda b, s: ([s, 16], [2 * s, 8]), FREE),
    "pairs of tokens": (lambda b, s: ([2 * s, 16], [s, 32]), FREE),
    "rows of another width": (lambda b, s: ([3 * s, 16], [4 * s, 12]), FREE),
    "rows of a width that does not divide": (lambda b, s: ([s, 16], [s * 16 // 12, 12]), FREE),
    "channels in front": (lambda b, s: ([s, 16], [16, s]), ([], [0])),
    "all in one": (lambda b, s: ([b, s, 16], [16 * b * s]), ([0], [])),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_where_labels_must_agree(name: str) -> None:
    shapes, expected = EXPECTED[name]
    before, after = shapes(*symbols())
    assert must_agree(before, after) == expected


class Classes:
    """Labels under equality."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def find(self, label: int) -> int:
        while self.parent[label] != label:
            label = self.parent[label]
        return label

    def equate(self, labels: torch.Tensor, dim: int, period: int) -> None:
        if period < 1 or labels.shape[dim] % period:
            period = 1
        parts = labels.unflatten(dim, (-1, period)).movedim(dim, 0)
        for line in parts[1:]:
            for a, b in zip(parts[0].flatten().tolist(), line.flatten().tolist(), strict=True):
                self.parent[self.find(a)] = self.find(b)

    def partition(self) -> set[frozenset[int]]:
        roots = [self.find(label) for label in range(len(self.parent))]
        return {frozenset(i for i, root in enumerate(roots) if root == one) for one in roots}


def analysed(
    before: list[Size], after: list[Size], hinted: Callable[[Size], int]
) -> tuple[set[frozenset[int]], torch.Tensor]:
    """What the analysis makes of a reshape at one size: which labels it equates, and the result's labels.

    The input's labels differ along fixed dimensions, and along c of a symbolic dimension of size c·s.
    """
    periods = [size if isinstance(size, int) else constant_factor(size) for size in before]
    count = math.prod(periods)
    labels = torch.arange(count).reshape(periods)
    labels = labels.repeat([hinted(size) // period for size, period in zip(before, periods, strict=True)])
    classes = Classes(count)
    front, back = must_agree(before, after)
    for dim in front:
        classes.equate(labels, dim, 1)
    result = labels.reshape([hinted(size) for size in after])
    for dim in back:
        classes.equate(result, dim, 1)
    for dim, size in enumerate(after):
        if isinstance(size, torch.SymInt):
            classes.equate(result, dim, constant_factor(size))
    return classes.partition(), result


@pytest.mark.parametrize("name", EXPECTED)
def test_the_same_labels_are_equated_at_every_size(name: str) -> None:
    shapes, _ = EXPECTED[name]
    before, after = shapes(*symbols())
    at: list[tuple[set[frozenset[int]], torch.Tensor]] = []
    for b, s in itertools.product((2, 3, 4), (3, 6, 9, 12)):
        if math.prod(evaluate(shapes, b, s)[0]) == math.prod(evaluate(shapes, b, s)[1]):
            numbers = [size for shape in evaluate(shapes, b, s) for size in shape]
            sizes = dict(zip(map(str, (*before, *after)), numbers, strict=True))
            at.append(analysed(before, after, lambda size, sizes=sizes: sizes[str(size)]))  # type: ignore[misc]
    assert len(at) >= 4
    partitions = [partition for partition, _ in at]
    assert all(partition == partitions[0] for partition in partitions)
    one = next(iter(partitions))
    number = {label: n for n, members in enumerate(sorted(one, key=min)) for label in members}
    corner = tuple(slice(0, min(result.shape[dim] for _, result in at)) for dim in range(at[0][1].ndim))
    corners = [[number[label] for label in result[corner].flatten().tolist()] for _, result in at]
    assert all(labels == corners[0] for labels in corners)


def evaluate(shapes: Shapes, b: int, s: int) -> tuple[list[int], list[int]]:
    before, after = shapes(b, s)
    return [int(size) for size in before], [int(size) for size in after]
