"""Groups of components, on graphs whose grouping is known."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from graphs import Attention, GatedMLP, RMSNorm, apply, captured
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears, info_of, linears
from qcompile.passes.gauge import analyse
from qcompile.passes.smoothing_groups import SmoothingGroups


def grouped(model: nn.Module, *inputs: Tensor) -> tuple[SmoothingGroups, dict[str, Node]]:
    gm, _ = apply(captured(model, *inputs), Canonicalize(), FindLinears())
    chosen = linears(gm)
    return SmoothingGroups(analyse(gm), chosen), {info_of(linear).name: linear for linear in chosen}


def test_linears_that_share_an_input_share_a_group() -> None:
    groups, found = grouped(GatedMLP(16, 24), torch.randn(2, 5, 16))
    assert [{info_of(node).name for node in members} for members in groups.members] == [
        {"gate_proj", "up_proj"},
        {"down_proj"},
    ]
    assert groups.sizes == [16, 24]
    number = groups.indices(groups.roots(found["down_proj"]))
    assert list(number) == [1]
    assert number[1].tolist() == list(range(1, 25))


def test_query_heads_of_one_kv_head_share_components() -> None:
    groups, found = grouped(Attention(16, heads=4, kv_heads=2), torch.randn(2, 5, 16))
    o_proj = found["o_proj"]
    (group,) = groups.indices(groups.roots(o_proj))
    assert groups.sizes[group] == 8
    numbers = groups.indices(groups.roots(o_proj))[group].reshape(4, 4)
    assert (numbers[0] == numbers[1]).all()
    assert (numbers[2] == numbers[3]).all()
    assert not (numbers[0] == numbers[2]).any()
    assert groups.indices(np.array([0, -1])) == {}, "ONE and ANY belong to no group"


def test_coarse_ties_are_not_folded_and_say_so() -> None:
    groups, found = grouped(Attention(16, heads=16, kv_heads=1), torch.randn(2, 5, 16))
    assert not groups.folds(found["o_proj"]).any()
    assert "coarsely" in groups.why_not(found["o_proj"])


def test_groups_that_meet_in_a_third_linear_become_one() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = RMSNorm(8), RMSNorm(8)
            self.a, self.b, self.both = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            h, g = self.left(x), self.right(x)
            return self.a(h) + self.b(g) + self.both(torch.cat([h, g], -1))

    groups, found = grouped(Joined(), torch.randn(3, 8))
    assert [{info_of(node).name for node in members} for members in groups.members] == [{"a", "b", "both"}]
    assert groups.sizes == [16]
    assert all(groups.why_not(linear) == "" for linear in found.values())


def test_nothing_free_means_no_group_and_a_reason() -> None:
    groups, found = grouped(nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8))
    assert groups.members == []
    assert groups.why_not(found["0"]) == "nothing before its input can take a scale"
