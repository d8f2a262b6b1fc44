"""The quantize step and the product, held to their definitions over arbitrary numbers and shapes."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from tolerances import assert_close
from torch import Tensor

from qcompile import ops, products
from qcompile.lowering.select import SCALED_MM, Implementation
from qcompile.lowering.target import detect

INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGEST = {dtype: min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) for dtype in DTYPES}
# Mantissa bits and the exponent of the smallest normal number.
MANTISSA, SMALLEST_EXPONENT = {E4M3: 3, E5M2: 2}, {E4M3: -6, E5M2: -14}
# Relative float32 roundings between x and x/scale: x to float32, absmax/limit, the division. Half an ulp each.
FLOAT32_SLACK = 3 * 2.0**-24
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 9))
SIZES = st.sampled_from([1, 2, 3, 5, 8, 16, 17, 31, 64, 65])
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """[rows, columns] of any dtype and any finite numbers: zero rows, subnormal, huge, mixed."""
    rows, columns = draw(SHAPES)
    dtype = draw(st.sampled_from(DTYPES))
    anything = st.floats(allow_nan=False, allow_infinity=False, width=32)
    usual = st.floats(-100, 100)
    values = []
    for _ in range(rows):
        elements = draw(st.sampled_from([usual, anything, st.just(0.0), st.floats(-1e-37, 1e-37)]))
        values.append(draw(st.lists(elements, min_size=columns, max_size=columns)))
    x = torch.tensor(values, dtype=torch.float64)
    return x.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


@st.composite
def exact_tensors(draw: st.DrawFn) -> Tensor:
    """Small integers times powers of two: exact in every dtype, also when scaled by 2^±4."""
    rows, columns = draw(SHAPES)
    generator = torch.Generator().manual_seed(draw(SEEDS))
    integers = torch.randint(-255, 256, (rows, columns), generator=generator)
    exponents = torch.randint(-5, 4, (rows, columns), generator=generator)
    x = integers * 2.0**exponents * (torch.rand(rows, 1, generator=generator) < 0.8)
    return x.to(draw(st.sampled_from(DTYPES)))


MODES = pytest.mark.parametrize("mode", ["row", "tensor"])
QUANTIZED = pytest.mark.parametrize("dtype", [INT8, E4M3, E5M2], ids=["int8", "e4m3", "e5m2"])


def steps(x: Tensor, scale: Tensor) -> Tensor:
    """x in units of its scale, in float64."""
    scale = scale.double()
    return x.double() / (scale.unsqueeze(-1) if scale.ndim else scale)


@MODES
@given(x=tensors())
def test_int8_is_off_by_half_a_step_at_most(mode: str, x: Tensor) -> None:
    q, scale = ops.quantize(x, [], mode, INT8)
    check_scale(x, scale, mode, 127)
    assert int(q.abs().max()) <= 127
    slack = 127 * FLOAT32_SLACK
    assert bool(((steps(x, scale) - q.double()).abs() <= 0.5 + slack).all())


@MODES
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@given(x=tensors())
def test_fp8_is_off_by_half_an_ulp_at_most(mode: str, dtype: torch.dtype, x: Tensor) -> None:
    q, scale = ops.quantize(x, [], mode, dtype)
    check_scale(x, scale, mode, ops.QUANTIZED_MAX[dtype])
    assert bool(torch.isfinite(q.float()).all())
    wanted = steps(x, scale)
    exponent = torch.frexp(wanted).exponent - 1
    half_ulp = 2.0 ** (exponent.clamp(min=SMALLEST_EXPONENT[dtype]) - MANTISSA[dtype] - 1).double()
    slack = wanted.abs() * FLOAT32_SLACK
    assert bool(((wanted - q.double()).abs() <= half_ulp + slack).all())


def check_scale(x: Tensor, scale: Tensor, mode: str, limit: float) -> None:
    """float32, positive, finite, and no larger than the data asks for."""
    assert scale.dtype == torch.float32
    assert tuple(scale.shape) == (tuple(x.shape[:-1]) if mode == "row" else ())
    absmax = x.double().abs().amax(-1) if mode == "row" else x.double().abs().amax()
    wanted = (absmax / limit).clamp(min=ops.SMALLEST_SCALE)
    assert bool(((scale.double() - wanted).abs() <= wanted * FLOAT32_SLACK).all())


@MODES
@QUANTIZED
@given(x=tensors())
def test_quantize_is_odd(mode: str, dtype: torch.dtype, x: Tensor) -> None:
    q, scale = ops.quantize(x, [], mode, dtype)
    negative, same = ops.quantize(-x, [], mode, dtype)
    assert torch.equal(negative.float(), -q.float())
    assert torch.equal(scale, same)


@MODES
@QUANTIZED
@given(x=exact_tensors(), exponent=st.integers(-4, 4))
def test_quantize_does_not_see_powers_of_two(mode: str, dtype: torch.dtype, x: Tensor, exponent: int) -> None:
    q, scale = ops.quantize(x, [], mode, dtype)
    shifted, shifted_scale = ops.quantize(x * 2.0**exponent, [], mode, dtype)
    assert torch.equal(shifted.float(), q.float())
    zero = scale == ops.SMALLEST_SCALE * torch.ones(())
    assert torch.equal(shifted_scale, torch.where(zero, scale, scale * 2.0**exponent))


@QUANTIZED
@given(x=tensors(), seed=SEEDS)
def test_factors_are_a_product_taken_before_rounding(dtype: torch.dtype, x: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = x.clamp(-1e4, 1e4)
    factor = 10 ** (torch.rand(x.shape[-1], generator=generator) * 4 - 2)
    wanted = ops.quantize(x.to(ops.wide(x.dtype)) * factor, [], "row", dtype)
    actual = ops.quantize(x, [factor], "row", dtype)
    assert torch.equal(actual[0].float(), wanted[0].float())
    assert torch.equal(actual[1], wanted[1])


@given(x=tensors(), seed=SEEDS)
def test_a_static_scale_quantizes_like_the_same_scale_found_on_the_way(x: Tensor, seed: int) -> None:
    q, scale = ops.quantize(x, [], "tensor", INT8)
    absmax = ops.observe(x)[0]
    assert torch.equal(ops.static_scale(absmax, [], INT8), scale)
    assert torch.equal(ops.quantize_static(x, scale, [], INT8), q)


@pytest.mark.parametrize("implementation", SCALED_MM, ids=lambda i: i.name)
@given(m=SIZES, n=SIZES, k=st.one_of(SIZES, st.sampled_from([127, 300, 1031])), seed=SEEDS, extreme=st.booleans())
def test_int8_sums_are_exact(implementation: Implementation, m: int, n: int, k: int, seed: int, extreme: bool) -> None:
    x, weight = integers(m, k, seed, extreme), integers(n, k, seed + 1, extreme)
    function = usable(implementation, x, weight)
    actual = function(x, weight, torch.ones(m), torch.ones(n), None, None, None, torch.float32)
    assert torch.equal(actual, (x.long() @ weight.long().T).float())


def usable(implementation: Implementation, x: Tensor, weight: Tensor) -> Callable[..., Tensor]:
    target = detect(x.device)
    if reason := implementation.runs_on(target):
        pytest.skip(f"{implementation.name} {reason}")
    if implementation.takes(target, x, weight):
        reject()
    return implementation.function


def integers(rows: int, columns: int, seed: int, extreme: bool) -> Tensor:
    """int8 values −127…127, or ±127 with one sign in most places, which overflows anything narrower than int32."""
    generator = torch.Generator().manual_seed(seed)
    if extreme:
        return torch.where(torch.rand(rows, columns, generator=generator) < 0.9, 127, -127).to(torch.int8)
    return torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("implementation", SCALED_MM, ids=lambda i: i.name)
@given(
    lead=st.lists(st.integers(1, 3), min_size=0, max_size=2),
    n=SIZES,
    k=SIZES,
    per_token=st.booleans(),
    bias=st.booleans(),
    residual=st.booleans(),
    activation=st.sampled_from([None, *products.ACTIVATIONS]),
    seed=SEEDS,
)
def test_the_epilogue_is_what_it_says(
    implementation: Implementation,
    lead: list[int],
    n: int,
    k: int,
    per_token: bool,
    bias: bool,
    residual: bool,
    activation: str | None,
    seed: int,
) -> None:
    m = math.prod(lead)
    x, weight = integers(m, k, seed, False).reshape(*lead, k), integers(n, k, seed + 1, False)
    function = usable(implementation, x, weight)
    generator = torch.Generator().manual_seed(seed)
    x_scale = torch.rand(lead if per_token else (), generator=generator) + 0.1
    weight_scale = torch.rand(n, generator=generator) / 127**2
    b = torch.randn(n, generator=generator) if bias else None
    r = torch.randn((*lead, n), generator=generator) if residual else None
    expected = (x.double() @ weight.double().T) * weight_scale.double()
    expected = expected * (x_scale.double().unsqueeze(-1) if per_token else x_scale.double())
    expected = expected if b is None else expected + b.double()
    expected = expected if activation is None else products.ACTIVATIONS[activation](expected)
    expected = expected if r is None else expected + r.double()
    actual = function(x, weight, x_scale, weight_scale, b, r, activation, torch.float32)
    assert_close("rewrite/float32", actual=actual, expected=expected.float())
