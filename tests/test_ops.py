"""The dialect's definitions: exact where integers are, within half a step where rounding is, finite everywhere."""

from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from qcompile import grouped_ops, ops, products

QUANTIZED = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LARGEST = 127  # of an int8 operand's magnitude
# x / scale is rounded to float32 before it is rounded to a step: 127 · 2^-24 of a step, generously doubled.
SLACK = 1 + 2**-15


def integers(*shape: int) -> Tensor:
    return torch.randint(-LARGEST, LARGEST + 1, shape, dtype=torch.int8)


def dequantized(q: Tensor, scale: Tensor) -> Tensor:
    return q.double() * (scale.double()[..., None] if scale.ndim else scale.double())


def extremes() -> dict[str, Tensor]:
    """Inputs [2, 4] at the edges of float32."""
    row = torch.tensor([1.0, -3.0, 0.25, 2.0])
    return {
        "zeros": torch.zeros(2, 4),
        "one zero row": torch.stack([row, torch.zeros(4)]),
        "negative zero": torch.stack([row, -torch.zeros(4)]),
        "denormal": torch.stack([row * 1e-40, row * 1e-45]),
        "smallest scale": torch.stack([row * 1e-30, row * 1e-28]),
        "huge": torch.stack([row * 1.1e38, row]),
        "one outlier": torch.stack([row + torch.tensor([0, 0, 0, 1e30]), row]),
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", ["row", "tensor"])
def test_int8_is_within_half_a_step(dtype: torch.dtype, mode: str) -> None:
    x = torch.randn(3, 5, 33, dtype=dtype)
    q, scale = ops.quantize(x, [], mode, torch.int8)
    assert q.dtype == torch.int8
    assert q.shape == x.shape
    assert scale.dtype == torch.float32
    assert scale.shape == (x.shape[:-1] if mode == "row" else ())
    step = scale.double()[..., None] if mode == "row" else scale.double()
    assert ((x.double() - dequantized(q, scale)).abs() <= step / 2 * SLACK).all()
    assert int(q.abs().max()) == LARGEST


@pytest.mark.parametrize("name", extremes())
@pytest.mark.parametrize("mode", ["row", "tensor"])
@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
def test_extreme_inputs_give_finite_positive_scales(name: str, mode: str, dtype: torch.dtype) -> None:
    x = extremes()[name]
    q, scale = ops.quantize(x, [], mode, dtype)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert q.float().isfinite().all()
    if dtype == torch.int8:
        step = (scale[:, None] if mode == "row" else scale).double()
        assert ((x.double() - dequantized(q, scale)).abs() <= step / 2 * SLACK).all()


@pytest.mark.parametrize(
    ("dtype", "relative", "smallest"),
    [(torch.float8_e4m3fn, 2**-4, 2**-10), (torch.float8_e5m2, 2**-3, 2**-17)],
    ids=["e4m3", "e5m2"],
)
@pytest.mark.parametrize("mode", ["row", "tensor"])
def test_fp8_is_within_half_a_unit_in_the_last_place(
    dtype: torch.dtype, relative: float, smallest: float, mode: str
) -> None:
    x = torch.randn(7, 65) * torch.logspace(-4, 4, 7)[:, None]
    q, scale = ops.quantize(x, [], mode, dtype)
    step = (scale[:, None] if mode == "row" else scale).double()
    error = (x.double() - dequantized(q, scale)).abs()
    assert (error <= torch.maximum(x.double().abs() * relative, step * smallest) * SLACK).all()
    assert float(q.float().abs().max()) == ops.QUANTIZED_MAX[dtype]


@pytest.mark.parametrize("mode", ["row", "tensor"])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (3, 0), (0, 0)], ids=str)
def test_empty_tensors_quantize(shape: tuple[int, ...], mode: str) -> None:
    q, scale = ops.quantize(torch.zeros(shape), [], mode, torch.int8)
    assert q.shape == shape
    assert scale.shape == (shape[:-1] if mode == "row" else ())
    assert (scale > 0).all()


def test_row_scales_do_not_see_other_rows() -> None:
    x = torch.randn(4, 16)
    louder = x.clone()
    louder[0] *= 1000
    for before, after in zip(
        ops.quantize(x, [], "row", torch.int8), ops.quantize(louder, [], "row", torch.int8), strict=True
    ):
        assert torch.equal(before[1:], after[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_factors_multiply_before_the_rounding(dtype: torch.dtype) -> None:
    """A factor inside quantize is as good as one applied in float64: no rounding to the input's dtype between."""
    x, factor, other = torch.randn(6, 32, dtype=dtype), torch.rand(32) + 0.5, torch.rand(32) + 0.5
    q, scale = ops.quantize(x, [factor, other], "row", torch.int8)
    exact = x.double() * factor.double() * other.double()
    assert ((exact - dequantized(q, scale)).abs() <= scale.double()[:, None] / 2 * SLACK).all()


@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
def test_static_quantization_saturates(dtype: torch.dtype) -> None:
    limit = ops.QUANTIZED_MAX[dtype]
    scale = torch.tensor(0.5)
    x = scale * torch.tensor([0.0, 1.0, -limit, limit, 3 * limit, -1e30])
    assert ops.quantize_static(x, scale, [], dtype).float().tolist() == [0, 1, -limit, limit, limit, -limit]
    doubled = ops.quantize_static(x, scale, [torch.full((6,), 2.0)], dtype)
    assert doubled.float().tolist() == [0, 2, -limit, limit, limit, -limit]


@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
def test_static_scale_reaches_the_largest_channel(dtype: torch.dtype) -> None:
    absmax, factor = torch.tensor([1.0, 8.0, 2.0]), torch.tensor([1.0, 0.25, 2.0])
    assert ops.static_scale(absmax, [factor], dtype).item() == pytest.approx(4 / ops.QUANTIZED_MAX[dtype])
    assert 0 < ops.static_scale(torch.zeros(3), [], dtype).item() <= ops.SMALLEST_SCALE * SLACK


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("per_token", [True, False])
def test_scaled_mm_follows_its_definition(leading: tuple[int, ...], per_token: bool) -> None:
    x, weight = integers(*leading, 33), integers(7, 33)
    x_scale = torch.rand(leading) + 0.1 if per_token else torch.tensor(0.3)
    weight_scale, bias, residual = torch.rand(7), torch.randn(7), torch.randn(*leading, 7)
    actual = ops.scaled_mm(x, weight, x_scale, weight_scale, bias, residual, "relu", torch.float32)
    column = x_scale.double()[..., None] if per_token else x_scale.double()
    exact = (x.long() @ weight.long().T).double() * column * weight_scale + bias
    assert_close("rewrite/float32", actual=actual, expected=(exact.relu() + residual).float())


@pytest.mark.parametrize("activation", products.ACTIVATIONS)
def test_activation_comes_after_bias_and_before_residual(activation: str) -> None:
    x, weight = integers(4, 16), integers(8, 16)
    scales = torch.full((4,), 1 / 512), torch.full((8,), 1 / 512)
    bias, residual = torch.randn(8), torch.randn(4, 8)
    actual = ops.scaled_mm(x, weight, *scales, bias, residual, activation, torch.float32)
    sums = (x.long() @ weight.long().T).double() / 512**2 + bias
    by_name = {
        "relu": torch.relu,
        "silu": lambda v: v * torch.sigmoid(v),
        "gelu": lambda v: v * 0.5 * (1 + torch.erf(v / 2**0.5)),
        "gelu_tanh": lambda v: 0.5 * v * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))),
    }
    assert_close("rewrite/float32", actual=actual, expected=(by_name[activation](sums) + residual).float())


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
def test_scaled_mm_rounds_once_to_the_output_dtype(out_dtype: torch.dtype) -> None:
    x, weight = integers(4, 16), integers(8, 16)
    scales = torch.rand(4), torch.rand(8)
    bias = torch.randn(8).to(out_dtype)
    whole = ops.scaled_mm(x, weight, *scales, bias.float(), None, None, torch.float32)
    assert torch.equal(ops.scaled_mm(x, weight, *scales, bias, None, None, out_dtype), whole.to(out_dtype))


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2), ("int8", torch.int8)]
)
def test_a_quantized_linear_is_close_to_the_float_one(name: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(64, 256), torch.randn(48, 256)
    x_q, x_scale = ops.quantize(x, [], "row", dtype)
    weight_q, weight_scale = ops.quantize(weight, [], "row", dtype)
    y = ops.scaled_mm(x_q, weight_q, x_scale, weight_scale, None, None, None, torch.float32)
    assert_close(f"{name}/linear", actual=y, expected=x @ weight.T)
    assert not torch.equal(y, x @ weight.T)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_observe_is_the_absmax_of_every_channel(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, dtype=dtype)
    assert torch.equal(ops.observe(x)[0], x.abs().amax((0, 1)).float())
    assert torch.equal(ops.observe(x[:0])[0], torch.zeros(5))


@pytest.mark.parametrize("rows", [0, 1, 3, 64, 100, 1000])
def test_observe_takes_rows_evenly(rows: int) -> None:
    x = torch.arange(1.0, rows + 1).unsqueeze(-1).expand(rows, 5)
    taken = ops.observe(x)[1]
    assert taken.shape == (64, 5)
    assert taken.dtype == torch.float32
    assert torch.equal(taken, taken[:, :1].expand(64, 5))
    counts = torch.unique(taken[:, 0], return_counts=True)[1]
    assert counts.numel() == max(1, min(rows, 64))
    assert counts.max() - counts.min() <= 1


def test_observe_lets_nan_through() -> None:
    x = torch.randn(4, 3)
    x[2, 1] = torch.nan
    assert ops.observe(x)[0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_power_of_two_is_the_nearest_in_ratio_and_exact(dtype: torch.dtype) -> None:
    scale = torch.cat([2 ** (torch.rand(1000, dtype=dtype) * 34 - 17), 2.0 ** torch.arange(-17, 18, dtype=dtype)])
    rounded = ops.power_of_two(scale)
    assert rounded.dtype == dtype
    mantissa, _ = torch.frexp(rounded)
    assert (mantissa == 0.5).all()
    assert (scale / rounded).log2().abs().max() <= 0.5 + 1e-6
    assert torch.equal(rounded[1000:], scale[1000:])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rescale_keeps_the_dtype_and_computes_wider(dtype: torch.dtype) -> None:
    x, factors = torch.randn(5, 8, dtype=dtype), [torch.rand(8) + 0.5, torch.rand(5, 1) + 0.5]
    exact = x.double() * factors[0].double() * factors[1].double()
    assert_close(
        f"rewrite/{str(dtype).removeprefix('torch.')}", actual=ops.rescale(x, factors), expected=exact.to(dtype)
    )
    if dtype in (torch.bfloat16, torch.float16):
        wrong = ((x * factors[0].to(dtype)) * factors[1].to(dtype) != exact.to(dtype)).sum()
        assert (ops.rescale(x, factors) != exact.to(dtype)).sum() < wrong


def operands() -> list[Any]:
    x, weight = torch.randn(4, 16), torch.randn(8, 16)
    x_q, x_scale = ops.quantize(x, [], "row", torch.int8)
    weight_q, weight_scale = ops.quantize(weight, [], "row", torch.int8)
    return [x_q, weight_q, x_scale, weight_scale]


CALLS: dict[str, Any] = {
    "observe": lambda: (ops.observe, (torch.randn(3, 16),)),
    "observe empty": lambda: (ops.observe, (torch.randn(0, 16),)),
    "smoothing_scale": lambda: (
        ops.smoothing_scale,
        ([torch.rand(16)], [torch.randn(8, 16)], [torch.arange(1, 17)], 16, 0.5),
    ),
    "search_smoothing_scale": lambda: (
        ops.search_smoothing_scale,
        ([torch.rand(16)], [torch.randn(8, 16)], [torch.arange(1, 17)], [torch.randn(64, 16)], 16, "row", torch.int8),
    ),
    "power_of_two": lambda: (ops.power_of_two, (torch.rand(5) + 0.1,)),
    "rescale": lambda: (ops.rescale, (torch.randn(3, 16).bfloat16(), [torch.rand(16)])),
    "quantize row": lambda: (ops.quantize, (torch.randn(2, 3, 16), [torch.rand(16)], "row", torch.int8)),
    "quantize tensor": lambda: (ops.quantize, (torch.randn(3, 16).half(), [], "tensor", torch.float8_e4m3fn)),
    "quantize_static": lambda: (ops.quantize_static, (torch.randn(3, 16), torch.tensor(0.1), [], torch.int8)),
    "static_scale": lambda: (ops.static_scale, (torch.rand(16), [torch.rand(16)], torch.int8)),
    "clipped_static_scale": lambda: (
        ops.clipped_static_scale,
        (torch.rand(16) + 2, torch.randn(64, 16), [torch.rand(16)], "mse", torch.int8),
    ),
    "concatenate": lambda: (ops.concatenate, ([torch.randn(3, 16), torch.randn(2, 16)],)),
    "scaled_mm": lambda: (ops.scaled_mm, (*operands(), None, None, None, torch.float32)),
    "scaled_mm epilogue": lambda: (
        ops.scaled_mm,
        (*operands(), torch.randn(8), torch.randn(4, 8), "silu", torch.bfloat16),
    ),
    "accumulate": lambda: (ops.accumulate, (integers(2, 4, 16), integers(8, 16))),
    "from_sums": lambda: (
        ops.from_sums,
        (sums(), *operands()[2:], torch.randn(8), torch.randn(4, 8), "silu", torch.bfloat16),
    ),
    "attention": lambda: (ops.attention, (torch.randn(2, 6, 5, 8), *torch.randn(2, 2, 6, 9, 8), None, True, 0.5)),
    "attention to shared keys": lambda: (
        ops.attention,
        (torch.randn(2, 6, 5, 8), *torch.randn(2, 2, 3, 9, 8), torch.rand(2, 1, 5, 9) > 0.3, False, 0.5),
    ),
}


def sums() -> Tensor:
    return torch.randint(-(2**30), 2**30, (4, 8), dtype=torch.int32)


@pytest.mark.parametrize("dtype", ops.QUANTIZED_MAX, ids=str)
@pytest.mark.parametrize("mode", ["row", "tensor"])
def test_the_largest_magnitude_is_at_the_limit_whatever_it_is(dtype: torch.dtype, mode: str) -> None:
    """Without a clamp: its quotient is the limit, rounded. Every exponent above the smallest scale's, both signs."""
    random = torch.Generator().manual_seed(0)
    exponent = torch.randint(-80, 128, (20_000,), generator=random)
    x = torch.ldexp(1 + torch.rand(20_000, generator=random), exponent).unsqueeze(-1) * torch.tensor([1.0, -1.0, 0.3])
    x = x[x.isfinite().all(-1)]
    rows = x if mode == "row" else x[:500]
    for part in [rows] if mode == "row" else rows:
        q, _ = ops.quantize(part, [], mode, dtype)
        q = q.to(torch.float32).reshape(-1, 3)
        limit = ops.QUANTIZED_MAX[dtype]
        assert bool((q[:, 0] == limit).all())
        assert bool((q[:, 1] == -limit).all())
        assert bool((q[:, 2] < limit / 2).all())


@pytest.mark.parametrize("name", CALLS)
def test_schema_and_fake_agree_with_the_function(name: str) -> None:
    operator, arguments = CALLS[name]()
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_stored_scales_are_what_their_dtype_holds(dtype: torch.dtype) -> None:
    """Down to rows so small that float16 has only a coarse scale for them, or none."""
    x = torch.randn(60, 32) * 10 ** torch.linspace(-14, 3, 60).unsqueeze(1)
    x[5] = 0
    q, scale = ops.quantize(x, [], "row", torch.int8, dtype)
    assert torch.equal(scale.to(dtype).to(torch.float32), scale)
    assert (scale > 0).all()
    error = (q * scale.unsqueeze(1) - x).abs().amax(1)
    assert (error <= scale * 0.7501).all()  # half a step, and a bfloat16 rounding of the scale times 127
    plain, _ = ops.quantize(x, [], "row", torch.int8)
    assert (q - plain).abs()[40:].max() <= 1
    assert torch.equal(ops.row_scale(x, [], torch.int8, dtype), scale)


def test_clipping_keeps_rare_outlier_channels_and_cuts_rare_tokens() -> None:
    rows = torch.randn(64, 16)
    rows[:, 3] *= 100
    whole = ops.static_scale(rows.abs().amax(0), [], torch.int8)
    for clip in ("percentile", "mse"):
        assert ops.clipped_static_scale(rows.abs().amax(0), rows, [], clip, torch.int8) >= 0.6 * whole
    absmax = torch.randn(64, 16).abs().amax(0)
    absmax[5] = 1000.0  # one token of all the calibration's, not among the sampled ones
    rows = torch.randn(64, 16)
    whole = ops.static_scale(absmax, [], torch.int8)
    assert ops.clipped_static_scale(absmax, rows, [], "percentile", torch.int8) < 0.01 * whole
    assert ops.clipped_static_scale(absmax, rows, [], "mse", torch.int8) <= whole


def test_clipping_by_error_is_the_least_error() -> None:
    rows, absmax = torch.randn(64, 16), torch.full((16,), 6.0)
    values = torch.cat([rows, absmax.unsqueeze(0)])

    def error(scale: torch.Tensor) -> float:
        return float((ops.quantize_static(values, scale, [], torch.int8) * scale - values).square().sum())

    whole = ops.static_scale(absmax, [], torch.int8)
    chosen = ops.clipped_static_scale(absmax, rows, [], "mse", torch.int8)
    assert error(chosen) == min(error(whole * share) for share in ops.CLIPS)


@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
def test_a_product_is_its_sums_and_what_becomes_of_them(dtype: torch.dtype) -> None:
    x, weight, x_scale, weight_scale = operands()
    x, weight = x.to(dtype).reshape(2, 2, 16), weight.to(dtype)
    rest = (x_scale.reshape(2, 2), weight_scale, torch.randn(8), torch.randn(2, 2, 8), "gelu", torch.bfloat16)
    found = ops.accumulate(x, weight)
    assert found.dtype == (torch.int32 if dtype == torch.int8 else torch.float32)
    assert torch.equal(ops.from_sums(found, *rest), ops.scaled_mm(x, weight, *rest))


def test_sums_beyond_float32_are_exact() -> None:
    x, weight = torch.full((1, 2**12), 127, dtype=torch.int8), torch.full((1, 2**12), 127, dtype=torch.int8)
    x[0, 0] = 126
    assert ops.accumulate(x, weight).item() == 127 * 127 * (2**12 - 1) + 126 * 127 > 2**24


def test_a_static_scale_may_be_one_per_token() -> None:
    x = torch.randn(2, 3, 16)
    q, scale = ops.quantize(x, [], "row", torch.int8)
    assert torch.equal(ops.quantize_static(x, scale.unsqueeze(-1), [], torch.int8), q)


def test_every_operator_of_the_dialect_is_checked() -> None:
    experts = {grouped_ops.grouped_linear, grouped_ops.scaled_grouped_mm}  # test_grouped_ops.py
    assert {CALLS[name]()[0] for name in CALLS} | experts == set(ops.REFERENCES)
