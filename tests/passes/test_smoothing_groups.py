"""Components that meet in one linear form one group; each group's channels are numbered 1…n."""

import numpy as np
import pytest
import torch
from graphs import Attention, GatedMLP, PostNorm, ReluMLP, apply, captured
from probe import Body
from torch import Tensor, nn
from torch.fx import Node

from qcompile.passes import smoothing_groups
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears, info_of, linears
from qcompile.passes.gauge import analyse
from qcompile.passes.smoothing_groups import SmoothingGroups


def groups_of(model: nn.Module, *chosen: str) -> tuple[SmoothingGroups, dict[str, Node]]:
    """The groups that the named linears ask for (all of them, if none is named), and the linears by name."""
    gm, _ = apply(captured(model, torch.randn(2, 5, 16)), Canonicalize(), FindLinears(ignore=()))
    by_name = {info_of(node).name: node for node in linears(gm)}
    return SmoothingGroups(analyse(gm), [by_name[name] for name in chosen or by_name]), by_name


def members(groups: SmoothingGroups) -> list[list[str]]:
    return [[info_of(node).name for node in group] for group in groups.members]


@pytest.mark.parametrize(
    ("kind", "expected", "sizes"),
    [
        (GatedMLP, [["gate_proj", "up_proj"], ["down_proj"]], [16, 24]),
        (Attention, [["q_proj", "k_proj", "v_proj"], ["o_proj"]], [16, 8]),
        (ReluMLP, [["fc1"], ["fc2"]], [16, 24]),
        (PostNorm, [], []),
    ],
)
def test_siblings_decide_together(kind: type[nn.Module], expected: list[list[str]], sizes: list[int]) -> None:
    groups, _ = groups_of(kind())
    assert members(groups) == expected
    assert groups.sizes == sizes


def test_a_linear_that_was_not_chosen_decides_nothing() -> None:
    groups, by_name = groups_of(GatedMLP(), "up_proj")
    assert members(groups) == [["up_proj"]]
    roots = groups.roots(by_name["gate_proj"])
    (index,) = groups.indices(roots).values()  # but its channels carry the group's numbers: it must be compensated
    assert sorted(index.tolist()) == list(range(1, 17))
    assert groups.indices(groups.roots(by_name["down_proj"])) == {}


def test_components_are_numbered_from_one() -> None:
    groups, by_name = groups_of(Attention())
    for name, group in (("q_proj", 0), ("o_proj", 1)):
        found = groups.indices(groups.roots(by_name[name]))
        assert list(found) == [group]
        assert set(found[group].tolist()) == set(range(1, groups.sizes[group] + 1))
    o_proj = groups.indices(groups.roots(by_name["o_proj"]))[1].reshape(2, 2, 4)
    np.testing.assert_array_equal(o_proj[:, 0], o_proj[:, 1])  # two query heads share a value head's scales


def test_indices_of_plain_channels_are_zero() -> None:
    """Half of the linear's channels are the norm's, half the model's input."""
    model = Body(lambda m, x: m.fc(torch.cat([m.norm(x), x], -1)), norm=nn.LayerNorm(16), fc=nn.Linear(32, 8))
    groups, by_name = groups_of(model)
    (index,) = groups.indices(groups.roots(by_name["fc"])).values()
    assert sorted(index[:16].tolist()) == list(range(1, 17))
    assert not index[16:].any()
    assert groups.folds(by_name["fc"]).tolist() == [True] * 16 + [False] * 16
    assert groups.why_not(by_name["fc"]) == "nothing before its input can take a scale"


class Joining(nn.Module):
    """left and right have groups of their own until both, which comes last, reads the channels of both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.left, self.right, self.both = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(32, 8)
        self.alone, self.norm3 = nn.Linear(16, 8), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.norm(x), self.norm2(x)
        y = self.left(a) + self.right(b) + self.alone(self.norm3(x))
        return y + self.both(torch.cat([a, b], -1))


def test_groups_that_meet_become_one() -> None:
    groups, by_name = groups_of(Joining())
    assert members(groups) == [["left", "right", "both"], ["alone"]]
    assert groups.sizes == [32, 16]
    index = groups.indices(groups.roots(by_name["both"]))[0]
    assert sorted(index.tolist()) == list(range(1, 33))
    parts = [groups.indices(groups.roots(by_name[name]))[0] for name in ("left", "right")]
    np.testing.assert_array_equal(index, np.concatenate(parts))


def test_the_order_of_the_linears_does_not_matter() -> None:
    forward, by_name = groups_of(Joining())
    backward = SmoothingGroups(forward._sweep, [by_name[name] for name in ("alone", "both", "right", "left")])
    assert sorted(sorted(names) for names in members(backward)) == [["alone"], ["both", "left", "right"]]
    assert sorted(backward.sizes) == [16, 32]


@pytest.mark.parametrize(("heads", "folds"), [(1, True), (8, True), (16, False)])
def test_a_tie_may_not_be_too_coarse(heads: int, folds: bool) -> None:
    """One value channel serves `heads` channels of the output projection."""

    def body(m: nn.Module, x: Tensor) -> Tensor:
        v = m.get_submodule("v")(x)
        return m.get_submodule("o")(v.repeat(1, 1, heads))

    groups, by_name = groups_of(Body(body, v=nn.Linear(16, 16 // heads), o=nn.Linear(16, 4)))
    assert groups.folds(by_name["o"]).all() == folds
    assert groups.folds(by_name["o"]).any() == folds
    assert groups.why_not(by_name["o"]) == (
        "" if folds else "its channels are tied so coarsely that one scale would serve too many"
    )


def test_the_limit_of_coarseness_is_what_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing_groups, "FINEST_TIE", 1.0)
    groups, by_name = groups_of(Attention())
    assert groups.folds(by_name["q_proj"]).all()
    assert not groups.folds(by_name["o_proj"]).any()
    assert members(groups) == [["q_proj", "k_proj", "v_proj"]]


def test_a_pinned_input_gives_its_reason() -> None:
    groups, by_name = groups_of(PostNorm())
    assert "native_layer_norm in out" in groups.why_not(by_name["fc1"])
    assert "gelu" in groups.why_not(by_name["fc2"])
    assert not groups.folds(by_name["fc1"]).any()


def test_nothing_chosen_makes_no_groups() -> None:
    groups, by_name = groups_of(GatedMLP())
    empty = SmoothingGroups(groups._sweep, [])
    assert (empty.members, empty.sizes) == ([], [])
    assert empty.indices(empty.roots(by_name["down_proj"])) == {}
