"""Counts of several layers are one foreach; everything else stays, and so do the numbers."""

import copy
from typing import Any

import pytest
import torch
from graphs import captured, count
from torch import Tensor, nn
from torch.fx import GraphModule

from qcompile.lowering.merge_counters import merge_counters
from qcompile.rewrite import copy_graph

aten = torch.ops.aten


class Counting(nn.Module):
    """A layer for every count, which it reads before it adds to it, and, where told, after."""

    def __init__(self, counts: list[Tensor], amounts: list[Any], *, after: bool = False) -> None:
        super().__init__()
        self.counts, self.amounts, self.after = counts, amounts, after

    def forward(self, x: Tensor) -> Tensor:
        for at, (number, amount) in enumerate(zip(self.counts, self.amounts, strict=True)):
            x = x * number
            number.add_(amount)
            if self.after and at == 0:
                x = x + number
        return x


def merged(module: Counting) -> tuple[GraphModule, GraphModule, list[Any]]:
    """The graph before and after, and arguments."""
    one = captured(module, torch.randn(3))
    after = merge_counters(copy_graph(one.graph))
    after.graph.lint()
    return one.graph, after, one.args


def check_equal(before: GraphModule, after: GraphModule, args: list[Any]) -> None:
    """Results, and what is written, twice in a row."""
    left, right = copy.deepcopy(args), copy.deepcopy(args)
    for _ in range(2):
        assert torch.equal(before(*left)[0], after(*right)[0])
        for a, b in zip(left, right, strict=True):
            assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(left, args, strict=True)), "something is counted"


def numbers(*values: int, dtype: torch.dtype = torch.int64) -> list[Tensor]:
    return [torch.tensor([value], dtype=dtype) for value in values]


@pytest.mark.parametrize("after", [False, True], ids=["", "read after it is counted"])
def test_counts_are_added_together(after: bool) -> None:
    before, graph, args = merged(Counting(numbers(3, 5, 8), [1, 1, 1], after=after))
    assert count(before, aten.copy_.default) == 3
    (together,) = graph.graph.find_nodes(op="call_function", target=aten._foreach_add.Scalar)
    assert len(together.args[0]) == 3
    assert [node.op for node in together.args[0]] == ["placeholder"] * 3
    assert together.args[1] == 1
    assert count(graph, aten.copy_.default) == 3
    assert count(graph, aten.add.Tensor) == (2 if after else 0), "that which is read, and the reader"
    check_equal(before, graph, args)


def test_only_what_is_alike_is_added_together() -> None:
    counts = [*numbers(3, 5, 8, 9), *numbers(2, dtype=torch.int32), torch.arange(3), torch.ones(1)]
    before, graph, args = merged(Counting(counts, [1, 2, 1, 2, 1, 1, 0.5]))
    found = graph.graph.find_nodes(op="call_function", target=aten._foreach_add.Scalar)
    assert [(len(node.args[0]), node.args[1]) for node in found] == [(2, 1), (2, 2)]
    assert count(graph, aten.add.Tensor) == 3, "another dtype, more than one number, a fraction"
    check_equal(before, graph, args)


def test_one_count_stays() -> None:
    before, graph, args = merged(Counting(numbers(3), [1]))
    assert not count(graph, aten._foreach_add.Scalar)
    check_equal(before, graph, args)
