"""Linears become quantize + scaled_mm with the scales they should have; smoothing goes into the quantize step."""

import functools
from typing import Any

import pytest
import torch
from compiling import by_hand
from graphs import Attention, GatedMLP, PostNorm, ReluMLP, apply, captured, count, outputs, targets
from probe import Body, hostile
from tolerances import assert_close
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from qcompile import ops
from qcompile.captured import Captured
from qcompile.dump import graph_text
from qcompile.pass_pipeline import PassResult, Pipeline
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears
from qcompile.passes.quantize_linears import QuantizeLinears
from qcompile.passes.smooth import Smooth
from qcompile.rewrite import args_of, input_of, static_nodes
from qcompile.validate import Validate, graph_inputs
from qcompile.verify import Verify

aten = torch.ops.aten
KINDS: dict[str, Any] = {
    "gated": lambda: GatedMLP(bias=True),
    "attention": Attention,
    "post-norm": PostNorm,
    "relu": ReluMLP,
}
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@functools.cache
def model(kind: str) -> nn.Module:
    made: nn.Module = KINDS[kind]()
    return made.eval().requires_grad_(False)


@functools.cache
def subject(kind: str, dynamic: bool = False) -> Captured:
    return captured(model(kind), torch.randn(2, 5, 16), dynamic=dynamic)


def quantized(one: Captured, step: QuantizeLinears, *smooth: Smooth, ignore: tuple[str, ...] = ()) -> GraphModule:
    return apply(one, Canonicalize(), FindLinears(ignore), *smooth, step)[0]


def values(gm: GraphModule, one: Captured, absmax: float = 1.0) -> dict[Node, Any]:
    """Every node's value, with statistics of ones times `absmax`."""

    class Keep(Interpreter):
        def run_node(self, n: Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    found: dict[Node, Any] = {}
    sizes = {
        input_of(n).name: n.meta["val"].shape
        for n in gm.graph.find_nodes(op="placeholder")
        if input_of(n).of is not None
    }
    with torch.no_grad():
        Keep(gm).run(*graph_inputs(gm, one.args, lambda weight, name, field: torch.full(sizes[name], absmax)))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("activations", "op"), [("token", ops.quantize), ("tensor", ops.quantize), ("static", ops.quantize_static)]
)
def test_every_linear_is_quantized(dtype: Any, activations: Any, op: Any) -> None:
    gm = quantized(subject("gated"), QuantizeLinears(dtype, activations))
    products = gm.graph.find_nodes(op="call_function", target=ops.scaled_mm)
    assert (len(products), count(gm, aten.linear.default)) == (3, 0)
    assert count(gm, ops.quantize) == (6 if activations != "static" else 3)
    static = static_nodes(gm)
    for product in products:
        x, weight, x_scale, weight_scale, bias, residual, activation, out_dtype = args_of(product)
        assert x.meta["val"].dtype == weight.meta["val"].dtype == DTYPES[dtype]
        assert {weight, weight_scale, bias} <= static
        assert x not in static
        assert (x_scale in static) == (activations == "static")
        assert tuple(x_scale.meta["val"].shape) == ((2, 5) if activations == "token" else ())
        assert tuple(weight_scale.meta["val"].shape) == weight.meta["val"].shape[:1]
        assert (residual, activation, out_dtype) == (None, None, torch.float32)
        quantizer = x if activations == "static" else args_of(x)[0]
        assert quantizer.target is op


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_what_integers_give(kind: str) -> None:
    """Per-token int8 against int64 sums written out by hand, through the whole module."""
    one = subject(kind)
    (actual,) = outputs(quantized(one, QuantizeLinears()), one)
    with torch.no_grad():
        expected = by_hand(model(kind))(activation(one))
    assert_close("rewrite/float32", actual=actual, expected=expected)


def activation(one: Captured) -> Tensor:
    (x,) = [arg for arg in one.args if isinstance(arg, Tensor) and not isinstance(arg, nn.Parameter)]
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ["token", "tensor", "static"])
def test_a_single_linear_is_within_the_error_of_its_dtype(dtype: Any, activations: Any) -> None:
    one = captured(nn.Linear(256, 64), torch.randn(32, 256))
    gm = quantized(one, QuantizeLinears(dtype, activations))
    (actual,) = outputs(gm, one, float(activation(one).abs().max()))
    assert_close(f"{dtype}/linear", actual=actual, expected=outputs(one.graph, one)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activations", ["token", "tensor", "static"])
@pytest.mark.parametrize("smooth", [(), (Smooth(),)], ids=["plain", "smooth"])
def test_every_product_is_within_the_bound_of_its_scales(
    kind: str, activations: Any, smooth: tuple[Smooth, ...]
) -> None:
    one, validate = subject(kind), Validate()
    step = QuantizeLinears("int8", activations)
    gm, _ = Pipeline((Canonicalize(), FindLinears(()), *smooth, step)).run(one.graph, [Verify(full=True), validate])
    statistics = {input_of(n).name: n for n in gm.graph.find_nodes(op="placeholder") if input_of(n).of is not None}
    checked = validate.check(one.args, lambda weight, name, field: hostile(statistics[name]))
    assert [check.step.split("{")[0] for check in checked][-1] == "quantize_linears"
    assert 0 < checked[-1].error <= 1


def test_static_scales_are_the_calibrated_ranges() -> None:
    one = subject("gated")
    gm = quantized(one, QuantizeLinears("int8", "static"))
    found = values(gm, one, 2.54)
    scales = gm.graph.find_nodes(op="call_function", target=ops.static_scale)
    assert [round(float(found[scale]), 6) for scale in scales] == [0.02] * 3


def test_siblings_use_one_statistic() -> None:
    """So that their scales are identical and one quantize step can serve them all."""
    gm = quantized(subject("attention"), QuantizeLinears("int8", "static"))
    absmax = [args_of(scale)[0] for scale in gm.graph.find_nodes(op="call_function", target=ops.static_scale)]
    assert absmax[0] is absmax[1] is absmax[2] is not absmax[3]


@pytest.mark.parametrize("activations", ["token", "tensor", "static"])
@pytest.mark.parametrize("kind", ["gated", "post-norm"])
def test_smoothing_goes_into_the_quantize_step(kind: str, activations: Any) -> None:
    one = subject(kind)
    gm = quantized(one, QuantizeLinears("int8", activations), Smooth())
    moving = [
        node for node in gm.graph.find_nodes(op="call_function", target=ops.rescale) if node not in static_nodes(gm)
    ]
    assert [node for node in moving if node.users] == []
    for product in gm.graph.find_nodes(op="call_function", target=ops.scaled_mm):
        weight = args_of(args_of(product)[1])[0]
        assert args_of(weight)[0].op == "placeholder"
        assert 1 <= len(args_of(weight)[1]) <= 2


@pytest.mark.parametrize("kind", ["gated", "post-norm"])
def test_a_static_scale_covers_the_smoothed_input(kind: str) -> None:
    """Calibrated on the very inputs, nothing saturates and the whole range is used, folded or absorbed."""
    one = subject(kind)
    plain, _ = apply(one, Canonicalize(), FindLinears(()))
    read = values(plain, one)
    absmax = {}
    for linear in plain.graph.find_nodes(op="call_function", target=aten.linear.default):
        weight = args_of(linear)[1]
        absmax[input_of(weight).name] = read[args_of(linear)[0]].abs().flatten(0, 1).amax(0)
    gm = quantized(one, QuantizeLinears("int8", "static"), Smooth())
    found: list[Tensor] = []

    class Watch(Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            if n.target is ops.quantize_static:
                found.append(result)
            return result

    with torch.no_grad():
        (actual,) = Watch(gm).run(*graph_inputs(gm, one.args, lambda weight, name, field: absmax[name]))
    first = found[0]
    assert int(first.abs().max()) == 127
    assert int((first.abs() == 127).sum()) <= 2
    assert_close("int8/model", actual=actual, expected=outputs(one.graph, one)[0])


def test_ignored_linears_stay_in_float() -> None:
    gm = quantized(subject("gated"), QuantizeLinears(), ignore=("gate_proj", "down_proj"))
    assert (count(gm, aten.linear.default), count(gm, ops.scaled_mm)) == (2, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_output_keeps_its_dtype(dtype: torch.dtype) -> None:
    one = captured(nn.Linear(64, 32).to(dtype), torch.randn(8, 64, dtype=dtype))
    (actual,) = outputs(quantized(one, QuantizeLinears()), one)
    assert_close("int8/linear", actual=actual, expected=outputs(one.graph, one)[0])


@pytest.mark.parametrize("activations", ["token", "tensor", "static"])
def test_symbolic_sizes(activations: Any) -> None:
    one = subject("attention", True)
    verify = Verify(full=True)
    gm, _ = Pipeline((Canonicalize(), FindLinears(()), QuantizeLinears("int8", activations))).run(one.graph, [verify])
    assert count(gm, ops.scaled_mm) == 4
    fixed = quantized(subject("attention"), QuantizeLinears("int8", activations))
    assert [t for t in targets(gm) if "qcompile" in t] == [t for t in targets(fixed) if "qcompile" in t]


@pytest.mark.parametrize("rows", [(1, 16), (1, 1, 16), (0, 16), (2, 0, 16)], ids=str)
@pytest.mark.parametrize("activations", ["token", "tensor", "static"])
def test_one_token_and_none(rows: tuple[int, ...], activations: Any) -> None:
    one = captured(nn.Linear(16, 8), torch.randn(rows))
    (actual,) = outputs(quantized(one, QuantizeLinears("int8", activations)), one, 4.0)
    assert actual.shape == (*rows[:-1], 8)
    assert torch.isfinite(actual).all()
    if actual.numel():
        assert_close("int8/model", actual=actual, expected=outputs(one.graph, one)[0])


def test_twice_is_once() -> None:
    gm = quantized(subject("gated"), QuantizeLinears(), Smooth())
    before = graph_text(gm)
    assert QuantizeLinears().run(gm) == PassResult(0)
    assert graph_text(gm) == before


@pytest.mark.parametrize("ignore", [(), ("fc",)], ids=["no linear", "ignored"])
def test_a_graph_with_nothing_to_quantize_keeps_its_text(ignore: tuple[str, ...]) -> None:
    body = (lambda m, x: m.fc(x)) if ignore else (lambda m, x: torch.tanh(x))
    gm, _ = apply(captured(Body(body, fc=nn.Linear(16, 8)), torch.randn(2, 16)), Canonicalize(), FindLinears(ignore))
    before = graph_text(gm)
    assert QuantizeLinears().run(gm) == PassResult(0)
    assert graph_text(gm) == before
