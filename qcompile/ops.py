"""The dialect: the few semantic operators that passes put into a graph.

Each operator is one short PyTorch function. That function is its definition, its fake implementation, the
reference that runs anywhere, and the fallback when a target has no kernel. Kernels live in `qcompile.lowering`.

Notation (docs/notation.md): M tokens, K input channels, N output channels. A *scale* always multiplies to
dequantize, x ≈ q · scale. Quantization is symmetric: int8 uses −127…127, fp8 e4m3 ±448, e5m2 ±57344.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qcompile import products

LIBRARY = torch.library.Library("qcompile", "DEF")  # type: ignore[no-untyped-call]

TORCH_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
QUANTIZED_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
# Elements of a weight that are converted to float32 at a time.
BLOCK, GPU_BLOCK = 2**19, 2**24
# Keeps a row of zeros, or of numbers so small that 1/scale would overflow, at a finite positive scale.
SMALLEST_SCALE = 1e-30
# Rows of every linear's input that calibration keeps, to compare quantized products on.
SAMPLED_ROWS = 64
# Shares of the calibrated range that a static scale may keep when it is chosen by its squared error on sampled rows,
# and the share of tokens that it keeps whole when it is chosen by percentile. (A percentile of all values would cut off
# the outlier channels that large models live by: there are few of them, but in every token.)
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
PERCENTILE = 0.99
# The migration strengths that alpha="auto" tries, besides no smoothing.
ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Smoothing factors outside this range stop being worth their loss of precision when folded into half-precision
# parameters; channels at the bounds are still exact, only less smoothed.
SMALLEST_FACTOR, LARGEST_FACTOR = 1e-5, 1e5


def define(
    schema: str, function: Callable[..., object], fake: Callable[..., object] | None = None
) -> torch._ops.OpOverload:
    """An operator whose fake is its definition, unless that would take long to trace."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"qcompile::{name}", fake or function, lib=LIBRARY)
    overload: torch._ops.OpOverload = getattr(torch.ops.qcompile, name).default
    return overload


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scales and factors are computed for tensors of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _multiply(x: Tensor, factors: list[Tensor]) -> Tensor:
    product = x.to(wide(x.dtype))
    for factor in factors:
        product = product * factor
    return product


def _observe(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    if not len(rows):
        return x.new_zeros(x.shape[-1], dtype=torch.float32), x.new_zeros(SAMPLED_ROWS, x.shape[-1])
    index = torch.arange(SAMPLED_ROWS, device=x.device) * len(rows) // SAMPLED_ROWS
    return column_absmax(rows).to(torch.float32), rows[index]


def column_absmax(weight: Tensor) -> Tensor:
    """[..., N, K] → [K], without a copy of the matrices."""
    rows = tuple(range(weight.ndim - 1))
    return torch.maximum(weight.amax(rows), -weight.amin(rows))


def blocks(weight: Tensor) -> tuple[Tensor, ...]:
    """Rows of a weight [N, K], so many at a time that a few float32 copies of them fit a cache."""
    return torch.split(weight, max(1, (BLOCK if weight.is_cpu else GPU_BLOCK) // max(1, weight.shape[1])))


def _smoothing_scale(
    absmax: list[Tensor], weights: list[Tensor], index: list[Tensor], components: int, alpha: float
) -> Tensor:
    dtype = wide(weights[0].dtype)
    largest_x = weights[0].new_zeros(components + 1, dtype=dtype)
    largest_w = torch.zeros_like(largest_x)
    for x_k, weight, component in zip(absmax, weights, index, strict=True):
        w_k = column_absmax(weight).to(dtype)
        largest_x = largest_x.scatter_reduce(0, component, x_k.to(dtype), "amax")
        largest_w = largest_w.scatter_reduce(0, component, w_k, "amax")
    scale = (largest_x**alpha / largest_w ** (1 - alpha)).clamp(SMALLEST_FACTOR, LARGEST_FACTOR)
    usable = (largest_x > 0) & (largest_w > 0)
    usable = usable & (torch.arange(components + 1, device=usable.device) > 0)
    return torch.where(usable, scale, torch.ones_like(scale))


def _empty_scale(weights: list[Tensor], components: int) -> Tensor:
    return weights[0].new_empty(components + 1, dtype=wide(weights[0].dtype))


def _search_smoothing_scale(
    absmax: list[Tensor],
    weights: list[Tensor],
    index: list[Tensor],
    rows: list[Tensor],
    components: int,
    mode: str,
    dtype: torch.dtype,
) -> Tensor:
    weights = [weight.flatten(0, -2) for weight in weights]  # experts: all of them, on rows of any of them
    unscaled = weights[0].new_ones(components + 1, dtype=wide(weights[0].dtype))
    candidates = [unscaled, *(_smoothing_scale(absmax, weights, index, components, alpha) for alpha in ALPHAS)]
    exact = [_product(row, weight) for row, weight in zip(rows, weights, strict=True)]
    errors = []
    for scale in candidates:
        error = unscaled.new_zeros((), dtype=torch.float32)
        for x_k, weight, component, row, y in zip(absmax, weights, index, rows, exact, strict=True):
            difference = _quantized_product(row, weight, scale[component], x_k, mode, dtype) - y
            error = error + difference.square().sum() / y.square().sum().clamp(min=SMALLEST_SCALE)
        errors.append(error)
    return torch.stack(candidates)[torch.stack(errors).argmin()]


def _quantized_product(
    row: Tensor, weight: Tensor, factor: Tensor, absmax: Tensor, mode: str, dtype: torch.dtype
) -> Tensor:
    """What a linear makes of sampled rows [R, K] once it is smoothed by factor [K] and quantized, float32 [R, N]."""
    inverse = factor.reciprocal()
    if mode == "static":
        x_scale = _static_scale(absmax, [inverse], dtype)
        x_q = _quantize_static(row, x_scale, [inverse], dtype)
    else:
        x_q, x_scale = _quantize(row, [inverse], mode, dtype)
    parts = []
    for block in blocks(weight):
        weight_q, weight_scale = _quantize(block, [factor], "row", dtype)
        # float32 sums are close enough to compare candidates, and several times faster than exact ones.
        parts.append(products.epilogue(_product(x_q, weight_q), x_scale, weight_scale, None, None, None, torch.float32))
    return torch.cat(parts, -1)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, K] · weightᵀ [K, N] in float32, converted block by block."""
    wide_x = x.to(torch.float32)
    return torch.cat([wide_x @ block.to(torch.float32).t() for block in blocks(weight)], -1)


def _power_of_two(scale: Tensor) -> Tensor:
    mantissa, _ = torch.frexp(scale)
    above = scale / mantissa  # mantissa is in [1/2, 1): the power of two at or above, exactly
    return torch.where(mantissa.square() < 0.5, above / 2, above)


def _rescale(x: Tensor, factors: list[Tensor]) -> Tensor:
    return _multiply(x, factors).to(x.dtype)


def _to_quantized(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = QUANTIZED_MAX[dtype]
    if not dtype.is_floating_point:
        values = values.round()
    return values.clamp(-limit, limit).to(dtype)


def _scale_of(absmax: Tensor, dtype: torch.dtype) -> Tensor:
    scale = (absmax.to(torch.float32) / QUANTIZED_MAX[dtype]).clamp(min=SMALLEST_SCALE)
    # With an infinite one, Inf would become whatever integer a compiler converts NaN to, and the product ±Inf.
    return torch.where(scale.isinf(), torch.nan, scale)


def representable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in float32 that `dtype` can hold: the nearest, or the one above where the nearest is coarse or 0."""
    info = torch.finfo(dtype)
    half_a_step = info.smallest_normal * info.eps / 2  # of the subnormals; nothing beside a normal number
    smallest = info.smallest_normal * info.eps
    return (scale + half_a_step).to(dtype).to(torch.float32).clamp(min=smallest)


def row_scale(x: Tensor, factors: list[Tensor], dtype: torch.dtype, scale_dtype: torch.dtype | None) -> Tensor:
    """The scale [N] that `quantize` gives the rows of x [N, K]."""
    return _rounded_scale(_multiply(x, factors).to(torch.float32).abs().amax(-1), dtype, scale_dtype)


def _rounded_scale(absmax: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype | None) -> Tensor:
    scale = _scale_of(absmax, dtype)
    return scale if scale_dtype is None else representable(scale, scale_dtype)


def row_absmax(values: Tensor) -> Tensor:
    """float32 [..., K] → [...]."""
    return values.abs().amax(-1)


def _quantize(
    x: Tensor,
    factors: list[Tensor],
    mode: str,
    dtype: torch.dtype,
    scale_dtype: torch.dtype | None = None,
    row_absmax: Callable[[Tensor], Tensor] = row_absmax,
) -> tuple[Tensor, Tensor]:
    values = _multiply(x, factors).to(torch.float32)
    if mode == "row":
        absmax = row_absmax(values) if values.shape[-1] else values.new_zeros(values.shape[:-1])
    else:
        # maximum() with a zero keeps an empty tensor legal where amax() alone has no identity.
        absmax = torch.cat([values.abs().reshape(-1), values.new_zeros(1)]).amax()
    scale = _rounded_scale(absmax, dtype, scale_dtype)
    steps = values / (scale.unsqueeze(-1) if mode == "row" else scale)
    if scale_dtype is None:  # the largest is at the limit, up to what rounding takes away again: nothing to clamp
        return (steps if dtype.is_floating_point else steps.round()).to(dtype), scale
    return _to_quantized(steps, dtype), scale


def _quantize_static(x: Tensor, scale: Tensor, factors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return _to_quantized(_multiply(x, factors).to(torch.float32) / scale, dtype)


def _static_scale(absmax: Tensor, factors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return _scale_of(_multiply(absmax, factors).amax(), dtype)


def _clipped_static_scale(
    absmax: Tensor, rows: Tensor, factors: list[Tensor], clip: str, dtype: torch.dtype
) -> Tensor:
    values = _multiply(rows, factors).to(torch.float32)
    largest = _static_scale(absmax, factors, dtype)
    if clip == "percentile":
        reached = torch.quantile(values.abs().amax(-1), PERCENTILE)
        return torch.minimum(largest, _scale_of(reached, dtype))
    # A few rows hardly meet the rarest values, which are the largest; one more row has every channel's.
    values = torch.cat([values, _multiply(absmax, factors).to(torch.float32).unsqueeze(0)])
    candidates = torch.stack([largest * share for share in CLIPS])
    errors = [
        (_to_quantized(values / scale, dtype).to(torch.float32) * scale - values).square().sum()
        for scale in candidates
    ]
    return candidates[torch.stack(errors).argmin()]


def _concatenate(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    grouped = key.shape[1] != query.shape[1]
    y = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return y.transpose(1, 2).contiguous().transpose(1, 2)


_scaled_mm = products.scaled_mm_of(products.accumulate)
_sums = products.sums_of(products.accumulate)


observe = define(
    "observe(Tensor x) -> (Tensor, Tensor)",
    _observe,
    lambda x: (x.new_empty(x.shape[-1], dtype=torch.float32), x.new_empty(SAMPLED_ROWS, x.shape[-1])),
)
"""x [..., K] any float → per-channel absmax [K] float32 and 64 evenly spaced rows [64, K] of x's dtype. Fewer rows than
that are repeated; empty x gives zeros."""

smoothing_scale = define(
    "smoothing_scale(Tensor[] absmax, Tensor[] weights, Tensor[] index, int components, float alpha) -> Tensor",
    _smoothing_scale,
    lambda absmax, weights, index, components, alpha: _empty_scale(weights, components),
)
"""SmoothQuant's s = max|x|^α / max|W|^(1−α) for every component of tied channels (arXiv:2211.10438, eq. 4).

absmax [K] float32, weight [..., N, K] and index [K] int64 per linear; index names each channel's component,
1…components. Returns s [components + 1], float32 or float64. Entry 0 is 1: index 0 means "not scaled".
Channels that calibration never saw, or whose weights are all zero, get 1.
"""

search_smoothing_scale = define(
    "search_smoothing_scale(Tensor[] absmax, Tensor[] weights, Tensor[] index, Tensor[] rows, int components, str mode,"
    " ScalarType dtype) -> Tensor",
    _search_smoothing_scale,
    lambda absmax, weights, index, rows, components, mode, dtype: _empty_scale(weights, components),
)
"""The best of `smoothing_scale` over ALPHAS and of no smoothing at all: least output error after quantization.

As `smoothing_scale`, with rows [R, K] float32 sampled from each linear's input. The error is Σ ‖ŷ − y‖² / ‖y‖² over the
linears, with the quantizers that will run: mode "row", "tensor" or "static" for activations, per-channel weights.
"""

power_of_two = define("power_of_two(Tensor scale) -> Tensor", _power_of_two)
"""Positive scales, each to the power of two nearest in ratio. Exact: multiplying by the result only moves exponents."""

rescale = define("rescale(Tensor x, Tensor[] factors) -> Tensor", _rescale)
"""x times every factor (broadcast, finite, positive), computed in at least float32, in x's dtype."""

quantize = define(
    "quantize(Tensor x, Tensor[] factors, str mode, ScalarType dtype, ScalarType? scale_dtype=None)"
    " -> (Tensor, Tensor)",
    _quantize,
    lambda x, factors, mode, dtype, scale_dtype=None: (
        torch.empty_like(x, dtype=dtype),
        x.new_empty(x.shape[:-1] if mode == "row" else (), dtype=torch.float32),
    ),
)
"""x [..., K], rescaled by factors, → q [..., K] of `dtype` and scale float32: [...] per "row", [] per "tensor".

"row" is per-token for activations and per-channel for a weight [N, K]. Scales that will be stored in `scale_dtype` are
rounded to it before anything is quantized with them.
"""

quantize_static = define(
    "quantize_static(Tensor x, Tensor scale, Tensor[] factors, ScalarType dtype) -> Tensor", _quantize_static
)
"""x [..., K], rescaled by factors, → q [..., K] with a scale float32 known beforehand, [] or [..., 1]; saturates."""

static_scale = define("static_scale(Tensor absmax, Tensor[] factors, ScalarType dtype) -> Tensor", _static_scale)
"""Calibrated absmax [K], rescaled by factors [K], → scale [] float32 for `quantize_static`."""

clipped_static_scale = define(
    "clipped_static_scale(Tensor absmax, Tensor rows, Tensor[] factors, str clip, ScalarType dtype) -> Tensor",
    _clipped_static_scale,
    lambda absmax, rows, factors, clip, dtype: absmax.new_empty((), dtype=torch.float32),
)
"""As `static_scale`, for a range smaller than the largest value: sampled rows [R, K] say what may be cut off.

clip: "percentile" keeps 99% of the sampled rows whole, "mse" the share of the range with the least squared error, the
whole among them.
"""

concatenate = define("concatenate(Tensor[] parts) -> Tensor", _concatenate)
"""Parts [N_i, ...] → [ΣN_i, ...]. An operator of its own, so that it counts as prepared (lowering/partition.py)."""

scaled_mm = define(
    "scaled_mm(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, Tensor? residual,"
    " str? activation, ScalarType out_dtype) -> Tensor",
    _scaled_mm,
    lambda x, weight, x_scale, weight_scale, bias, residual, activation, out_dtype: x.new_empty(
        (*x.shape[:-1], weight.shape[0]), dtype=out_dtype
    ),
)
"""x [..., K] and weight [N, K], both int8 or fp8, → y [..., N] of out_dtype.

x_scale float32 is [...] (per-token) or [] (per-tensor), weight_scale [N] float32, bias [N], residual [..., N].
y = activation(x·weightᵀ · x_scale · weight_scale + bias) + residual; int8 sums are exact.
"""

accumulate = define(
    "accumulate(Tensor x, Tensor weight) -> Tensor",
    _sums,
    lambda x, weight: x.new_empty(
        (*x.shape[:-1], weight.shape[0]), dtype=torch.int32 if x.dtype == torch.int8 else torch.float32
    ),
)
"""x [..., K] and weight [N, K], both int8 or fp8, → x·weightᵀ [..., N] before any scale: int32, exact, or float32.

For products whose K is shared out to several processes, which add their sums before `from_sums`.
"""

from_sums = define(
    "from_sums(Tensor sums, Tensor x_scale, Tensor weight_scale, Tensor? bias, Tensor? residual, str? activation,"
    " ScalarType out_dtype) -> Tensor",
    products.from_sums,
    lambda sums, x_scale, weight_scale, bias, residual, activation, out_dtype: sums.new_empty(
        sums.shape, dtype=out_dtype
    ),
)
"""The sums [..., N] of `accumulate` → y [..., N] of out_dtype; `scaled_mm` is the one after the other."""

attention = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float? scale) -> Tensor",
    _attention,
    lambda query, key, value, mask, causal, scale: query.new_empty(
        (query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    ).transpose(1, 2),
)
"""query [B, H, L, D], key [B, G, S, D], value [B, G, S, E], G dividing H → softmax(q·kᵀ·scale + mask) · v [B, H, L, E].

Float, as torch.nn.functional.scaled_dot_product_attention defines it; in memory the result is [B, L, H, E]. mask
broadcasts to [B, H, L, S]: bool, true where a key is seen, or what is added to scores, in the query's dtype. causal:
query i sees keys up to i, counted from the first; then there is no mask. scale: None is 1/√D.
"""

REFERENCES: dict[torch._ops.OpOverload, Callable[..., object]] = {
    observe: _observe,
    smoothing_scale: _smoothing_scale,
    search_smoothing_scale: _search_smoothing_scale,
    power_of_two: _power_of_two,
    rescale: _rescale,
    quantize: _quantize,
    quantize_static: _quantize_static,
    static_scale: _static_scale,
    clipped_static_scale: _clipped_static_scale,
    concatenate: _concatenate,
    scaled_mm: _scaled_mm,
    accumulate: _sums,
    from_sums: products.from_sums,
    attention: _attention,
}
