"""What nobody reads goes; inputs, writes and random numbers' order do not."""

import operator
from typing import Any

import pytest
import torch
from graphs import GatedMLP, apply, captured, count, outputs, targets
from probe import Body
from torch import Tensor, nn
from torch.fx import GraphModule

from qcompile.dump import graph_text
from qcompile.pass_pipeline import PassResult
from qcompile.passes.eliminate_dead import EliminateDead
from qcompile.rewrite import copy_graph, output_of

aten = torch.ops.aten


class Cache(nn.Module):
    """Writes what it is given into a buffer, and returns something else."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(2, 4, 16))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("cache")[:, :3] = x
        return x + 1


def unread(gm: GraphModule, target: Any, *args: Any) -> torch.fx.Node:
    """A node at the end that nobody reads."""
    with gm.graph.inserting_before(output_of(gm.graph)):
        return gm.graph.call_function(target, args)


def test_a_chain_that_nobody_reads_goes() -> None:
    subject = captured(GatedMLP(), torch.randn(2, 3, 16))
    gm = copy_graph(subject.graph)
    x = next(iter(gm.graph.find_nodes(op="placeholder")))
    both = unread(gm, torch.ops.aten.var_mean.correction, x, [0])
    unread(gm, aten.relu.default, unread(gm, aten.neg.default, unread(gm, operator.getitem, both, 1)))
    gm.register_buffer("constant", torch.zeros(3))
    with gm.graph.inserting_before(output_of(gm.graph)):
        gm.graph.get_attr("constant")
    assert EliminateDead().run(gm) == PassResult(5)
    assert graph_text(gm) == graph_text(subject.graph)


def test_an_unread_input_stays() -> None:
    gm, (result,) = apply(captured(Body(lambda m, x: x.new_zeros(3)), torch.randn(2, 3)), EliminateDead())
    assert result.changes == 0
    assert len(gm.graph.find_nodes(op="placeholder")) == 1


def test_a_write_to_a_cache_stays_and_so_does_what_it_writes() -> None:
    subject = captured(Cache(), torch.randn(2, 3, 16))
    gm, (result,) = apply(subject, EliminateDead())
    assert result.changes == 0
    assert count(gm, aten.copy_.default) == 1
    assert targets(gm) == targets(subject.graph)
    torch.testing.assert_close(outputs(gm, subject), outputs(subject.graph, subject), rtol=0, atol=0)


def test_random_numbers_are_still_drawn() -> None:
    """Dropping an unread draw would change every later one."""
    subject = captured(Body(lambda m, x: x + 1), torch.randn(3))
    gm = copy_graph(subject.graph)
    unread(gm, aten.rand.default, [3])
    assert EliminateDead().run(gm).changes == 0
    assert count(gm, aten.rand.default) == 1


@pytest.mark.parametrize("model", [GatedMLP(), Cache()], ids=["mlp", "cache"])
def test_a_graph_in_use_keeps_its_text_and_twice_is_once(model: nn.Module) -> None:
    subject = captured(model, torch.randn(2, 3, 16))
    gm, results = apply(subject, EliminateDead(), EliminateDead())
    assert results == [PassResult(0), PassResult(0)]
    assert graph_text(gm) == graph_text(subject.graph)
