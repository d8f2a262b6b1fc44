"""Linears that read one tensor share its quantized copy; whatever differs is kept apart; no bit changes."""

import functools
from typing import Any

import pytest
import torch
from graphs import Attention, GatedMLP, PostNorm, apply, captured, count, outputs
from probe import Body
from torch import nn
from torch.fx import GraphModule

from qcompile import ops
from qcompile.captured import Captured
from qcompile.dump import graph_text
from qcompile.pass_pipeline import PassResult, Taken
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears
from qcompile.passes.quantize_linears import QuantizeLinears
from qcompile.passes.share_quantize import ShareQuantize
from qcompile.passes.smooth import Smooth
from qcompile.rewrite import Rewriter, args_of, copy_graph, static_nodes
from qcompile.verify import Verify

KINDS: dict[str, Any] = {"gated": GatedMLP, "attention": Attention, "post-norm": PostNorm}
SMOOTH = {"plain": (), "smooth": (Smooth(),)}


@functools.cache
def subject(kind: str) -> Captured:
    return captured(KINDS[kind](), torch.randn(2, 5, 16))


def quantized(one: Captured, activations: Any = "token", smooth: str = "plain") -> GraphModule:
    return apply(one, Canonicalize(), FindLinears(()), *SMOOTH[smooth], QuantizeLinears("int8", activations))[0]


def activations_quantized(gm: GraphModule) -> int:
    static = static_nodes(gm)
    return sum(node.target in (ops.quantize, ops.quantize_static) and node not in static for node in gm.graph.nodes)


@pytest.mark.parametrize(("kind", "before", "after"), [("gated", 3, 2), ("attention", 4, 2), ("post-norm", 2, 2)])
@pytest.mark.parametrize("activations", ["token", "tensor", "static"])
@pytest.mark.parametrize("smooth", SMOOTH)
def test_one_quantize_per_tensor(kind: str, before: int, after: int, activations: Any, smooth: str) -> None:
    gm = quantized(subject(kind), activations, smooth)
    weights = sum(node in static_nodes(gm) for node in gm.graph.find_nodes(op="call_function", target=ops.quantize))
    assert activations_quantized(gm) == before
    shared = copy_graph(gm)
    verify = Verify(full=True)
    verify.start(shared)
    result = ShareQuantize().run(shared)
    verify.step(Taken(0, ShareQuantize(), None, shared, result, 0.0))
    assert activations_quantized(shared) == after
    assert result.changes or (kind, before) == ("post-norm", after)
    kept = static_nodes(shared)
    assert weights == sum(node in kept for node in shared.graph.find_nodes(op="call_function", target=ops.quantize))
    for left, right in zip(outputs(gm, subject(kind)), outputs(shared, subject(kind)), strict=True):
        assert torch.equal(left, right)


def test_siblings_read_the_very_same_nodes() -> None:
    gm = quantized(subject("attention"))
    ShareQuantize().run(gm)
    q, k, v, o = (args_of(node) for node in gm.graph.find_nodes(op="call_function", target=ops.scaled_mm))
    assert q[0] is k[0] is v[0] is not o[0]
    assert q[2] is k[2] is v[2] is not o[2]


def test_a_tied_weight_is_quantized_once() -> None:
    model = Body(lambda m, x: m.fc(torch.relu(m.fc(x))), fc=nn.Linear(16, 16))
    gm = quantized(captured(model, torch.randn(2, 16)))
    assert count(gm, ops.quantize) == 4
    ShareQuantize().run(gm)
    assert count(gm, ops.quantize) == 3


DIFFERENT: dict[str, dict[int, Any]] = {
    "mode": {2: "tensor"},
    "dtype": {3: torch.float8_e4m3fn},
    "factors": {1: []},
    "tensor": {},
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_differs_is_kept_apart(what: str) -> None:
    """A second quantize of the same tensor, alike in all but one argument; a twin of it to show that twins merge."""
    model = Body(lambda m, x: m.fc(x), fc=nn.Linear(16, 8))
    gm = quantized(captured(model, torch.randn(2, 16)), smooth="smooth")
    (given,) = [n for n in gm.graph.find_nodes(op="call_function", target=ops.quantize) if n not in static_nodes(gm)]
    rewriter = Rewriter(gm, "test")
    args: list[Any] = list(args_of(given))
    if what == "tensor":
        args[0] = rewriter.emit(torch.ops.aten.neg.default, (args[0],), before=given, of=given, name="neg")
    for position, value in DIFFERENT[what].items():
        assert args[position] != value
        args[position] = value
    following = given.next
    rewriter.emit(ops.quantize, tuple(args), before=following, of=given, name="other")
    rewriter.emit(ops.quantize, args_of(given), before=following, of=given, name="twin")
    before = count(gm, ops.quantize)
    ShareQuantize().run(gm)
    assert count(gm, ops.quantize) == before - 1


@pytest.mark.parametrize("kind", KINDS)
def test_twice_is_once(kind: str) -> None:
    gm = quantized(subject(kind))
    ShareQuantize().run(gm)
    before = graph_text(gm)
    assert ShareQuantize().run(gm) == PassResult(0)
    assert graph_text(gm) == before


@pytest.mark.parametrize("quantize", [False, True], ids=["float", "nothing shared"])
def test_a_graph_with_nothing_to_share_keeps_its_text(quantize: bool) -> None:
    gm = quantized(subject("post-norm")) if quantize else copy_graph(subject("attention").graph)
    before = graph_text(gm)
    assert ShareQuantize().run(gm) == PassResult(0)
    assert graph_text(gm) == before
