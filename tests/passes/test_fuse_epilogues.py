"""Activations and residuals move into the GEMM when its result has no other reader; the numbers only get better."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Attention, GatedMLP, apply, captured, in_two_steps, outputs
from probe import Body
from tolerances import assert_close, row_for
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

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
from qcompile.rewrite import args_of, copy_graph
from qcompile.verify import Verify

Function = Callable[..., Any]


def quantized(one: Captured) -> GraphModule:
    return apply(one, Canonicalize(), FindLinears(()), QuantizeLinears(), ShareQuantize())[0]


def fused(gm: GraphModule) -> tuple[GraphModule, PassResult]:
    """A copy after the pass, verified."""
    copied = copy_graph(gm)
    verify = Verify(full=True)
    verify.start(copied)
    verify.stage = "quantized"
    result = FuseEpilogues().run(copied)
    verify.step(Taken(0, FuseEpilogues(), None, copied, result, 0.0))
    copied.recompile()
    return copied, result


def epilogues(gm: GraphModule) -> list[tuple[bool, str | None]]:
    """For each product, whether it adds a residual, and its activation."""
    products = gm.graph.find_nodes(op="call_function", target=ops.scaled_mm)
    return [(args_of(product)[5] is not None, args_of(product)[6]) for product in products]


def model(body: Function) -> Body:
    return Body(body, fc=nn.Linear(16, 16), up=nn.Linear(16, 16, bias=False), vector=nn.Parameter(torch.randn(16)))


def example(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 16, dtype=dtype)


FUSED: dict[str, tuple[Function, list[tuple[bool, str | None]]]] = {
    "relu": (lambda m, x: torch.relu(m.fc(x)), [(False, "relu")]),
    "silu": (lambda m, x: F.silu(m.fc(x)), [(False, "silu")]),
    "gelu": (lambda m, x: F.gelu(m.fc(x)), [(False, "gelu")]),
    "gelu tanh": (lambda m, x: F.gelu(m.fc(x), approximate="tanh"), [(False, "gelu_tanh")]),
    "residual right": (lambda m, x: m.fc(x) + x, [(True, None)]),
    "residual left": (lambda m, x: x + m.fc(x), [(True, None)]),
    "activation, then residual": (lambda m, x: x + F.silu(m.fc(x)), [(True, "silu")]),
    "residual, then activation": (lambda m, x: torch.relu(x + m.fc(x)), [(True, None)]),
    "two activations": (lambda m, x: torch.relu(F.silu(m.fc(x))), [(False, "silu")]),
    "two residuals": (lambda m, x: m.fc(x) + x + x.exp(), [(True, None)]),
    "a sum of two products": (lambda m, x: m.fc(x) + m.up(x), [(False, None), (True, None)]),
    "products of different activations": (
        lambda m, x: torch.relu(m.fc(x)) + F.silu(m.up(x)),
        [(False, "silu"), (True, "relu")],
    ),
    "a residual that comes later": (lambda m, x: m.fc(x) + torch.softmax(x, -1), [(True, None)]),
}


@functools.cache
def subject(name: str, dtype: torch.dtype, dynamic: bool = False) -> Captured:
    return captured(model(FUSED[name][0]).to(dtype), example(dtype), dynamic=dynamic)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_fused(name: str, dtype: torch.dtype) -> None:
    one = subject(name, dtype)
    before = quantized(one)
    after, result = fused(before)
    assert result.refusals == ()
    assert epilogues(after) == FUSED[name][1]
    nodes = len(before.graph.nodes) - len(after.graph.nodes)
    assert nodes == sum(int(residual) + int(activation is not None) for residual, activation in FUSED[name][1])
    assert_close(row_for("rewrite", dtype), actual=outputs(after, one)[0], expected=outputs(before, one)[0])


@pytest.mark.parametrize("name", FUSED)
def test_products_in_two_steps_fuse_alike(name: str) -> None:
    one = subject(name, torch.bfloat16)
    whole, _ = fused(quantized(one))
    apart, _ = fused(in_two_steps(quantized(one)))
    ends = apart.graph.find_nodes(op="call_function", target=ops.from_sums)
    assert [(args_of(end)[4] is not None, args_of(end)[5]) for end in ends] == FUSED[name][1]
    assert torch.equal(outputs(apart, one)[0], outputs(whole, one)[0])


@pytest.mark.parametrize("name", ["gelu tanh", "activation, then residual", "a sum of two products"])
def test_symbolic_sizes(name: str) -> None:
    one = subject(name, torch.float32, True)
    before = quantized(one)
    after, _ = fused(before)
    assert epilogues(after) == FUSED[name][1]
    assert_close("rewrite/float32", actual=outputs(after, one)[0], expected=outputs(before, one)[0])


def test_the_sum_is_rounded_once() -> None:
    """In bfloat16 the fused form is closer to float32 than separate ops are."""
    one = subject("activation, then residual", torch.bfloat16)
    before = quantized(one)
    after, _ = fused(before)
    exact = copy_graph(after)
    (product,) = exact.graph.find_nodes(op="call_function", target=ops.scaled_mm)
    product.args = (*args_of(product)[:7], torch.float64)
    (truth,), (separate,), (one_rounding,) = (outputs(gm, one) for gm in (exact, before, after))
    assert (one_rounding.double() - truth).norm() < (separate.double() - truth).norm()


ALONE: dict[str, Function] = {
    "two readers": lambda m, x: (lambda y: torch.relu(y) * y)(m.fc(x)),
    "its result is returned": lambda m, x: (lambda y: (torch.relu(y), y))(m.fc(x)),
    "added to itself": lambda m, x: (lambda y: y + y)(m.fc(x)),
    "another activation": lambda m, x: torch.tanh(m.fc(x)),
    "a residual that broadcasts": lambda m, x: m.fc(x) + m.vector,
    "a residual that the product broadcasts to": lambda m, x: m.fc(x[:1]) + x,
    "a number": lambda m, x: m.fc(x) + 1.0,
    "a scaled residual": lambda m, x: torch.add(m.fc(x), x, alpha=2),
    "another dtype": lambda m, x: m.fc(x) + x.double(),
    "a difference": lambda m, x: m.fc(x) - x,
    "a view between": lambda m, x: torch.relu(m.fc(x).transpose(1, 2)),
    "strides of a transposed residual": lambda m, x: (
        lambda y: (y.transpose(1, 2) + m.fc(y)).transpose(1, 2).reshape(2, 256)
    )(torch.tanh(torch.cat([x, x, x, x], 1)[:, :16])),
    "no product": lambda m, x: torch.relu(x) + x,
}


@pytest.mark.parametrize("name", ALONE)
def test_what_is_left_alone(name: str) -> None:
    one = captured(model(ALONE[name]), example())
    before = quantized(one)
    after, result = fused(before)
    assert result == PassResult(0)
    assert graph_text(after) == graph_text(before)
    for left, right in zip(outputs(before, one), outputs(after, one), strict=True):
        assert torch.equal(left, right)


def test_merged_siblings_have_no_epilogue_and_the_others_do() -> None:
    one = captured(nn.Sequential(Attention(), GatedMLP()), example())
    gm = quantized(one)
    MergeSiblings().run(gm)
    after, _ = fused(gm)
    assert epilogues(after) == [(False, None), (True, None), (False, None), (True, None)]
    assert_close("rewrite/float32", actual=outputs(after, one)[0], expected=outputs(gm, one)[0])


@pytest.mark.parametrize("name", FUSED)
def test_twice_is_once(name: str) -> None:
    gm, _ = fused(quantized(subject(name, torch.float32)))
    before = graph_text(gm)
    assert FuseEpilogues().run(gm) == PassResult(0)
    assert graph_text(gm) == before
