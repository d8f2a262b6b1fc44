"""Linears that read one quantized tensor become one GEMM, bit for bit, unless a reader could tell the difference."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Attention, GatedMLP, PostNorm, apply, captured, count, outputs
from probe import Body
from tolerances import assert_close
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qcompile import ops
from qcompile.captured import Captured
from qcompile.dump import graph_text
from qcompile.pass_pipeline import PassResult, Taken
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears
from qcompile.passes.fuse_epilogues import FuseEpilogues
from qcompile.passes.merge_siblings import MergeSiblings
from qcompile.passes.quantize_linears import QuantizeLinears
from qcompile.passes.share_quantize import ShareQuantize
from qcompile.passes.smooth import Smooth
from qcompile.rewrite import args_of, copy_graph, static_nodes
from qcompile.validate import graph_inputs
from qcompile.verify import Verify
from qcompile.weights import evaluate

aten = torch.ops.aten
KINDS: dict[str, Any] = {
    "gated": GatedMLP,
    "gated with bias": lambda: GatedMLP(bias=True),
    "attention": Attention,
    "attention with bias": lambda: Attention(bias=True),
}


@functools.cache
def subject(kind: str, dynamic: bool = False) -> Captured:
    return captured(KINDS[kind](), torch.randn(2, 5, 16), dynamic=dynamic)


def shared(one: Captured, *smooth: Smooth, activations: Any = "token") -> GraphModule:
    steps = (Canonicalize(), FindLinears(()), *smooth, QuantizeLinears("int8", activations), ShareQuantize())
    return apply(one, *steps)[0]


def merged(gm: GraphModule) -> tuple[GraphModule, PassResult]:
    """A copy after the pass, verified."""
    copied = copy_graph(gm)
    verify = Verify(full=True)
    verify.start(copied)
    verify.stage = "quantized"
    result = MergeSiblings().run(copied)
    verify.step(Taken(0, MergeSiblings(), None, copied, result, 0.0))
    copied.recompile()
    return copied, result


def assert_same_bits(one: Captured, before: GraphModule, after: GraphModule) -> None:
    for left, right in zip(outputs(before, one), outputs(after, one), strict=True):
        assert torch.equal(left, right)


def values(gm: GraphModule, one: Captured, wanted: list[Node]) -> list[Tensor]:
    """The values of some nodes, statistics being ones."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    sizes = {n.meta["input"].name: n.meta["val"].shape for n in placeholders if n.meta["input"].kind == "statistic"}
    inputs = graph_inputs(gm, one.args, lambda weight, name, field: torch.ones(sizes[name]))
    return evaluate(gm, inputs, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activations", ["token", "tensor", "static"])
@pytest.mark.parametrize("smooth", [(), (Smooth(),)], ids=["plain", "smooth"])
def test_siblings_become_one_product(kind: str, activations: Any, smooth: tuple[Smooth, ...]) -> None:
    one = subject(kind)
    before = shared(one, *smooth, activations=activations)
    after, result = merged(before)
    siblings, columns = (2, 48) if "gated" in kind else (3, 32)
    assert result.refusals == ()
    assert count(after, ops.scaled_mm) == count(before, ops.scaled_mm) - siblings + 1 == 2
    first, second = after.graph.find_nodes(op="call_function", target=ops.scaled_mm)
    assert first.meta["val"].shape[-1] == columns
    assert second.meta["val"].shape[-1] == 16
    static = static_nodes(after)
    assert all(args_of(first)[position] in static for position in (1, 3))
    assert (args_of(first)[4] is None) == ("bias" not in kind)
    parts = [node for node in after.graph.nodes if node.name.startswith("part")]
    products = before.graph.find_nodes(op="call_function", target=ops.scaled_mm)[:siblings]
    for left, right in zip(values(before, one, products), values(after, one, parts), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("kind", ["gated", "attention"])
def test_symbolic_sizes(kind: str) -> None:
    one = subject(kind, True)
    before = shared(one)
    after, result = merged(before)
    assert (count(after, ops.scaled_mm), result.refusals) == (2, ())
    assert_close("int8/model", actual=outputs(after, one)[0], expected=outputs(before, one)[0])


@pytest.mark.parametrize("shape", [(1, 16), (1, 1, 16), (0, 16)], ids=str)
def test_one_token_and_none(shape: tuple[int, ...]) -> None:
    one = captured(GatedMLP(), torch.randn(shape))
    before = shared(one)
    after, _ = merged(before)
    assert count(after, ops.scaled_mm) == 2
    assert_same_bits(one, before, after)


def parts() -> dict[str, nn.Module]:
    return {
        "a": nn.Linear(16, 8),
        "b": nn.Linear(16, 8, bias=False),
        "c": nn.Linear(16, 12),
        "norm": nn.LayerNorm(16),
    }


def example() -> Tensor:
    return torch.randn(2, 5, 16)


def split(gm: GraphModule) -> int:
    return count(gm, ops.scaled_mm)


def flattened(m: Any, x: Tensor) -> Any:
    return m.a(x).view(2, 40) * 2, m.c(x)


def as_strided(m: Any, x: Tensor) -> Any:
    """Strides that count storage elements: on a slice they would reach the sibling's columns."""
    return m.a(x).as_strided((2, 4, 8), (40, 8, 1)) * 2, m.c(x)


def as_strided_behind_views(m: Any, x: Tensor) -> Any:
    low, _ = m.a(x).unsqueeze(0).split(4, -1)
    return m.c(x), low.squeeze(0).as_strided((2, 5, 4), (40, 8, 1), 4) * 2


def viewed_behind_other_views(m: Any, x: Tensor) -> Any:
    return m.c(x), m.a(x).transpose(1, 2).unbind(0)[1].transpose(0, 1).view(40) * 2


REFUSED: dict[Callable[..., Any], str] = {
    lambda m, x: (m.a(x), m.b(x)): "some of the linears that read one tensor have a bias and some have none",
    flattened: "views its result in a way that a slice does not allow",
    as_strided: "views its result in a way that a slice does not allow",
    as_strided_behind_views: "views its result in a way that a slice does not allow",
    viewed_behind_other_views: "views its result in a way that a slice does not allow",
}


@pytest.mark.parametrize("body", REFUSED, ids=["bias", *(body.__name__ for body in list(REFUSED)[1:])])
def test_refusals(body: Callable[..., Any]) -> None:
    one = captured(Body(body, **parts()), example())
    before = shared(one)
    after, result = merged(before)
    assert [refusal.rule for refusal in result.refusals] == ["merge_siblings"]
    assert REFUSED[body] in result.refusals[0].reason
    assert result.refusals[0].node in {node.name for node in before.graph.nodes}
    assert (result.changes, split(after)) == (0, 2)
    assert_same_bits(one, before, after)


ALLOWED: dict[str, Callable[..., Any]] = {
    "views that a slice allows": lambda m, x: (m.a(x).view(2, 5, 2, 4).transpose(1, 2), m.c(x)[..., 3].unsqueeze(0)),
    "a copy before the view": lambda m, x: ((m.a(x) * 2).view(2, 40), m.c(x)),
    "a reshape that copies": lambda m, x: (m.a(x).transpose(1, 2).reshape(2, 40), m.c(x)),
    "results that are returned": lambda m, x: (m.a(x), m.c(x)),
    "as_strided of something else": lambda m, x: (m.a(x), m.c(x), x.as_strided((5,), (1,)) + 1),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_readers_that_cannot_tell(name: str) -> None:
    one = captured(Body(ALLOWED[name], **parts()), example())
    before = shared(one)
    after, result = merged(before)
    assert result.refusals == ()
    assert (split(before), split(after)) == (2, 1)
    assert_same_bits(one, before, after)


ALONE: dict[str, Callable[..., Any]] = {
    "other inputs": lambda m, x: (m.a(x), m.c(x + 1)),
    "one linear": lambda m, x: m.a(x),
    "no linear": lambda m, x: m.norm(x),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_graph_without_siblings_keeps_its_text(name: str) -> None:
    gm = shared(captured(Body(ALONE[name], **parts()), example()))
    before = graph_text(gm)
    assert MergeSiblings().run(gm) == PassResult(0)
    assert graph_text(gm) == before


def test_products_with_an_epilogue_of_their_own_are_left_alone() -> None:
    one = captured(Body(lambda m, x: (torch.relu(m.a(x)), m.c(x)), **parts()), example())
    gm = shared(one)
    assert FuseEpilogues().run(gm).changes
    before = graph_text(gm)
    assert MergeSiblings().run(gm) == PassResult(0)
    assert graph_text(gm) == before


def test_a_siblings_weight_may_be_made_later_in_the_graph() -> None:
    """The merged product stands where the first was; what makes the other weights is moved above it."""

    def body(m: Any, x: Tensor) -> Any:
        y = torch.tanh(m.a(x))
        return y, nn.functional.linear(x, m.c.weight * 2, m.c.bias + 1)

    one = captured(Body(body, **parts()), example())
    before = shared(one)
    after, _ = merged(before)
    assert split(after) == 1
    assert_same_bits(one, before, after)


@pytest.mark.parametrize("kind", [*KINDS, "refused"])
def test_twice_is_once(kind: str) -> None:
    one = captured(Body(flattened, **parts()), example()) if kind == "refused" else subject(kind)
    gm, first = merged(shared(one))
    before = graph_text(gm)
    assert MergeSiblings().run(gm) == PassResult(0, first.refusals)
    assert graph_text(gm) == before


def test_post_norm_has_no_siblings() -> None:
    gm = shared(captured(PostNorm(), example()))
    assert MergeSiblings().run(gm) == PassResult(0)
