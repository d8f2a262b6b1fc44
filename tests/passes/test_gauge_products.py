"""Batches of static matrices, expert by expert: exact in float64 under hostile statistics."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import apply, captured
from probe import Body, Probe, randomized, smoothed
from torch import Tensor, nn

from qcompile import ops
from qcompile.grouped_ops import grouped_linear
from qcompile.passes import gauge_rules
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears
from qcompile.passes.smooth import Smooth
from qcompile.rewrite import args_of

aten = torch.ops.aten
K, EXPERTS = 16, 3


def sorted_rows(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens in the order of their experts, and where each expert's rows end. (By its form, m.router is none.)"""
    h = m.norm(x)
    chosen = (m.router(h).sum(-1) * 7).long() % EXPERTS
    counts = torch.histc(chosen.double(), EXPERTS, 0, EXPERTS - 1)
    return h[chosen.argsort()], counts.cumsum(0).to(torch.int32)


def grouped_experts(m: Any, x: Tensor) -> Tensor:
    rows, ends = sorted_rows(m, x)
    up = torch._grouped_mm(rows, m.up.transpose(1, 2), offs=ends)
    return torch._grouped_mm(torch.relu(up), m.down, offs=ends)


def experts_that_meet_every_token(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    up = torch.bmm(h.expand(EXPERTS, *h.shape) * torch.sigmoid(m.router(h)).t()[..., None], m.up.transpose(1, 2))
    return torch.bmm(torch.relu(up), m.down).sum(0)


def experts_on_the_left(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    up = torch.bmm(m.up, h.t().expand(EXPERTS, K, len(h)))
    return m.router(h) + torch.bmm(m.down.transpose(1, 2), torch.relu(up)).sum((0, 1))[:, None]


def a_linear_after_an_expert(m: Any, x: Tensor) -> Tensor:
    """Rows of the expert matrices take the scale of the linear that follows."""
    rows, ends = sorted_rows(m, x)
    return m.fc(torch._grouped_mm(rows, m.up.transpose(1, 2), offs=ends))


def a_linear_after_a_batch(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    return m.router(h).sum() + m.fc(torch.bmm(h.expand(EXPERTS, *h.shape), m.up.transpose(1, 2)))


def two_batches_of_activations(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x).expand(EXPERTS, *x.shape)
    return m.router(m.norm(x)) + torch.softmax(torch.bmm(h, h.transpose(1, 2)), -1).sum()


BODIES: dict[Callable[..., Any], tuple[set[str], int]] = {  # what folds, and how many factors the matrices take
    grouped_experts: ({"router", "up", "down"}, 3),
    experts_that_meet_every_token: ({"router"}, 1),
    experts_on_the_left: ({"router"}, 1),
    a_linear_after_an_expert: ({"router", "up", "fc"}, 2),
    a_linear_after_a_batch: ({"router", "fc"}, 2),
    two_batches_of_activations: (set(), 0),
}


def built(body: Callable[..., Any]) -> nn.Module:
    model = Body(
        body,
        norm=nn.LayerNorm(K),
        router=nn.Linear(K, EXPERTS),
        fc=nn.Linear(24, 5),
        up=nn.Parameter(torch.randn(EXPERTS, 24, K)),
        down=nn.Parameter(torch.randn(EXPERTS, 24, K)),
    )
    return randomized(model).bfloat16()


INPUT = torch.randn(7, K, generator=torch.Generator().manual_seed(0)).bfloat16()


def probed(body: Callable[..., Any], step: Smooth) -> Probe:
    return smoothed(captured(built(body), INPUT), step)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_the_identity_holds(body: Callable[..., Any]) -> None:
    folds, factors = BODIES[body]
    found = probed(body, Smooth(absorb=False, edit="parameter"))
    found.assert_exact()
    assert found.folded == folds
    scaled = [args_of(node) for node in found.gm.graph.find_nodes(op="call_function", target=ops.rescale)]
    assert sum(len(taken) for static, taken in scaled if static.meta["val"].ndim == 3) == factors


BATCHES = [experts_that_meet_every_token, experts_on_the_left, a_linear_after_a_batch, two_batches_of_activations]


@pytest.mark.parametrize("body", BATCHES, ids=lambda body: body.__name__)
def test_float_matrices_are_not_copied(body: Callable[..., Any]) -> None:
    found = probed(body, Smooth())
    found.assert_exact()
    for node in found.gm.graph.find_nodes(op="call_function", target=ops.rescale):
        static = args_of(node)[0]
        assert static.meta["val"].ndim < 3 or static.target is not aten.permute.default


def test_experts_that_stay_in_float_are_not_copied_either() -> None:
    quantized, ignored = (
        apply(captured(built(grouped_experts), INPUT), Canonicalize(), FindLinears(ignore=patterns), Smooth())[0]
        for patterns in ((), ("up", "down"))
    )
    for gm, scaled in ((quantized, 2), (ignored, 0)):
        rescaled = [args_of(node)[0] for node in gm.graph.find_nodes(op="call_function", target=ops.rescale)]
        assert sum(static.meta["val"].ndim == 3 for static in rescaled) == scaled


def test_the_rules_are_in_the_table() -> None:
    assert gauge_rules.RULES[grouped_linear] is gauge_rules.grouped
    assert gauge_rules.RULES[aten.bmm.default] is gauge_rules.batched
