"""Which expression scales come from: a fixed α, the search, powers of two, and what is left of them at run time."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from graphs import Attention, GatedMLP, PostNorm, ReluMLP, captured, count
from probe import Body, Probe, randomized, smoothed
from torch import Tensor, nn

from qcompile import ops
from qcompile.captured import Captured
from qcompile.passes.find_linears import linears
from qcompile.passes.smooth import Smooth, Smoothing
from qcompile.rewrite import args_of, input_of

KINDS: dict[str, Any] = {"gated": GatedMLP, "attention": Attention, "relu": ReluMLP, "post-norm": PostNorm}


def subject(kind: str) -> Captured:
    return captured(randomized(KINDS[kind]()), torch.randn(2, 5, 16, dtype=torch.float64))


def statistics(found: Probe) -> list[str]:
    records = [input_of(node) for node in found.gm.graph.find_nodes(op="placeholder")]
    return [record.field for record in records if record.kind == "statistic"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_asks_for_no_rows(kind: str) -> None:
    found = smoothed(subject(kind), Smooth(0.5))
    assert set(statistics(found)) == {"absmax"}
    assert not count(found.gm, ops.search_smoothing_scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("activations", "mode"), [("token", "row"), ("tensor", "tensor"), ("static", "static")])
def test_auto_searches_with_the_quantizers_that_will_run(kind: str, activations: Any, mode: str) -> None:
    found = smoothed(subject(kind), Smooth("auto", dtype="fp8", activations=activations))
    searches = found.gm.graph.find_nodes(op="call_function", target=ops.search_smoothing_scale)
    assert len(searches) == 2  # the norm's group, and the one between the linears
    assert not count(found.gm, ops.smoothing_scale)
    assert statistics(found).count("rows") == statistics(found).count("absmax") == len(linears(found.gm))
    for search in searches:
        absmax, weights, index, rows, components, *quantizers = args_of(search)
        assert quantizers == [mode, torch.float8_e4m3fn]
        assert len(absmax) == len(weights) == len(index) == len(rows)
        assert components <= 24
        for x, row in zip(absmax, rows, strict=True):
            assert row.meta["val"].shape == (ops.SAMPLED_ROWS, *x.meta["val"].shape)
    found.assert_exact()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("power_of_two", ["drop", "absorb"])
def test_powers_of_two_are_what_parameters_take(kind: str, power_of_two: Any) -> None:
    found = smoothed(subject(kind), Smooth(0.3, power_of_two=power_of_two))
    found.assert_exact()
    folds = kind != "post-norm"
    assert bool(count(found.gm, ops.power_of_two)) == folds
    remainders = count(found.gm, torch.ops.aten.div.Tensor) - count(subject(kind).graph, torch.ops.aten.div.Tensor)
    assert bool(remainders) == (folds and power_of_two == "absorb")


@pytest.mark.parametrize("kind", ["gated", "attention", "relu"])
def test_folding_powers_of_two_moves_no_bit_in_bfloat16(kind: str) -> None:
    """Gains, biases and weights only change exponents. (A general s costs a rounding of each.)"""
    model = randomized(KINDS[kind]()).bfloat16()
    x = torch.randn(2, 5, 16).bfloat16()
    expected = float_outputs(model, x, None)
    assert torch.equal(float_outputs(model, x, Smooth(0.5, power_of_two="drop")), expected)
    assert not torch.equal(float_outputs(model, x, Smooth(0.5)), expected)


def float_outputs(model: nn.Module, x: Tensor, step: Smooth | None) -> Tensor:
    from graphs import apply, outputs

    from qcompile.passes.canonicalize import Canonicalize
    from qcompile.passes.find_linears import FindLinears

    one = captured(model, x)
    gm, _ = apply(one, Canonicalize(), FindLinears(()), *([step] if step else []))
    generator = torch.Generator().manual_seed(0)
    absmax = {
        input_of(node).name: 10 ** (torch.rand(node.meta["val"].shape, generator=generator) * 2 - 1)
        for node in gm.graph.find_nodes(op="placeholder")
        if input_of(node).kind == "statistic"
    }
    value: Tensor = outputs(gm, one, absmax)[0]
    return value


def test_the_remainder_makes_up_for_the_rounding() -> None:
    """Rounded or not, the linear's input is divided by the same s in all."""
    one = subject("gated")
    plain, rounded = smoothed(one, Smooth(0.3)), smoothed(one, Smooth(0.3, power_of_two="absorb"))
    weights = [[weight_of(found, i) for i in range(3)] for found in (plain, rounded)]
    for one, other in zip(*weights, strict=True):
        ratio = one / other
        assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio)), "columns take the whole s, rows a power of two"


def weight_of(found: Probe, index: int) -> Tensor:
    """A linear's weight as it reads it."""
    from probe import hostile

    from qcompile.validate import graph_inputs

    node = args_of(linears(found.gm)[index])[1]
    keys = {}
    for placeholder in found.gm.graph.find_nodes(op="placeholder"):
        keys[input_of(placeholder).name, input_of(placeholder).field] = placeholder
    inputs = graph_inputs(found.gm, found.captured.args, lambda w, name, field: hostile(keys[name, field]))

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if n is node:
                seen.append(result)
            return result

    seen: list[Tensor] = []
    with torch.no_grad():
        Watch(found.gm).run(*inputs)
    return seen[0]


def test_what_was_done_is_left_on_every_linear() -> None:
    found = smoothed(subject("gated"), Smooth())
    gate, up, down = (node.meta["smoothing"] for node in linears(found.gm))
    assert gate == up == Smoothing(16, 16, 0, ("norm.weight",), "")
    assert down == Smoothing(24, 24, 0, ("up_proj.weight",), "")


def test_what_could_not_be_folded_says_why() -> None:
    found = smoothed(subject("post-norm"), Smooth())
    fc1, fc2 = (node.meta["smoothing"] for node in linears(found.gm))
    assert (fc1.channels, fc1.folded, fc1.absorbed, fc1.into) == (16, 0, 16, ())
    assert (fc2.channels, fc2.folded, fc2.absorbed, fc2.into) == (24, 0, 24, ())
    assert fc2.reason == "no scale passes through, gelu (gelu)"
    refused = smoothed(subject("post-norm"), Smooth(absorb=False))
    assert [dataclasses.replace(node.meta["smoothing"], reason="") for node in linears(refused.gm)] == [
        Smoothing(16, 0, 0, (), ""),
        Smoothing(24, 0, 0, (), ""),
    ]


def test_part_of_a_linear_may_be_folded_and_the_rest_absorbed() -> None:
    model = Body(lambda m, x: m.fc(torch.cat([m.norm(x), x], -1)), norm=nn.LayerNorm(16), fc=nn.Linear(32, 8))
    one = captured(randomized(model), torch.randn(2, 5, 16, dtype=torch.float64))
    (linear,) = linears(smoothed(one, Smooth(power_of_two="absorb")).gm)
    told = linear.meta["smoothing"]
    assert (told.channels, told.folded, told.absorbed) == (32, 16, 16)
    assert told.into == ("norm.bias", "norm.weight")
    factors = args_of(args_of(linear)[0])[1]
    assert len(factors) == 2, "what is not folded, and what rounding left"
    assert np.prod(factors[0].meta["val"].shape) == 32
    smoothed(one, Smooth(power_of_two="absorb")).assert_exact()
