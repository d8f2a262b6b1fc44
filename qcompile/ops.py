"""The dialect: the few semantic operators that passes put into a graph.

Each operator is one short PyTorch function. That function is its definition, its fake implementation, the
reference that runs anywhere, and the fallback when a target has no kernel. Kernels live in `qcompile.lowering`.

Notation (docs/notation.md): M tokens, K input channels, N output channels. A *scale* always multiplies to
dequantize, x ≈ q · scale. Quantization is symmetric: int8 uses −127…127, fp8 e4m3 ±448, e5m2 ±57344.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("qcompile", "DEF")  # type: ignore[no-untyped-call]

TORCH_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
QUANTIZED_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
# Keeps a row of zeros, or of numbers so small that 1/scale would overflow, at a finite positive scale.
SMALLEST_SCALE = 1e-30
# Smoothing factors outside this range stop being worth their loss of precision when folded into half-precision
# parameters; channels at the bounds are still exact, only less smoothed.
SMALLEST_FACTOR, LARGEST_FACTOR = 1e-5, 1e5


def _define(schema: str, function: Callable[..., object]) -> torch._ops.OpOverload:
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"qcompile::{name}", function, lib=LIBRARY)
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


def _observe(x: Tensor) -> Tensor:
    if x.numel() == 0:
        return x.new_zeros(x.shape[-1], dtype=torch.float32)
    return x.abs().reshape(-1, x.shape[-1]).amax(0).to(torch.float32)


def _smoothing_scale(
    absmax: list[Tensor], weights: list[Tensor], index: list[Tensor], components: int, alpha: float
) -> Tensor:
    dtype = wide(weights[0].dtype)
    largest_x = weights[0].new_zeros(components + 1, dtype=dtype)
    largest_w = torch.zeros_like(largest_x)
    for x_k, weight, component in zip(absmax, weights, index, strict=True):
        w_k = weight.abs().amax(0).to(dtype)
        largest_x = largest_x.scatter_reduce(0, component, x_k.to(dtype), "amax")
        largest_w = largest_w.scatter_reduce(0, component, w_k, "amax")
    scale = (largest_x**alpha / largest_w ** (1 - alpha)).clamp(SMALLEST_FACTOR, LARGEST_FACTOR)
    usable = (largest_x > 0) & (largest_w > 0)
    usable = usable & (torch.arange(components + 1, device=usable.device) > 0)
    return torch.where(usable, scale, torch.ones_like(scale))


def _rescale(x: Tensor, factors: list[Tensor]) -> Tensor:
    return _multiply(x, factors).to(x.dtype)


def _to_quantized(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = QUANTIZED_MAX[dtype]
    if not dtype.is_floating_point:
        values = values.round()
    return values.clamp(-limit, limit).to(dtype)


def _scale_of(absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return (absmax.to(torch.float32) / QUANTIZED_MAX[dtype]).clamp(min=SMALLEST_SCALE)


def _quantize(x: Tensor, factors: list[Tensor], mode: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values = _multiply(x, factors).to(torch.float32)
    if mode == "row":
        absmax = values.abs().amax(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])
    else:
        # maximum() with a zero keeps an empty tensor legal where amax() alone has no identity.
        absmax = torch.cat([values.abs().reshape(-1), values.new_zeros(1)]).amax()
    scale = _scale_of(absmax, dtype)
    step = scale.unsqueeze(-1) if mode == "row" else scale
    return _to_quantized(values / step, dtype), scale


def _quantize_static(x: Tensor, scale: Tensor, factors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return _to_quantized(_multiply(x, factors).to(torch.float32) / scale, dtype)


def _static_scale(absmax: Tensor, factors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return _scale_of(_multiply(absmax, factors).amax(), dtype)


def _accumulate(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] · weightᵀ [K, N]: int32 and exact for int8, float32 for fp8.

    float64 holds every int8 sum exactly (127² · K < 2^53) and, unlike integers, has a fast product everywhere.
    """
    if x.dtype == torch.int8:
        return torch.mm(x.to(torch.float64), weight.to(torch.float64).t()).to(torch.int32)
    return torch.mm(x.to(torch.float32), weight.to(torch.float32).t())


def epilogue(
    sums: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Scales, bias, activation and residual on accumulated sums [M, N], in float32, in this order."""
    y = sums.to(torch.float32) * (x_scale.reshape(-1, 1) * weight_scale)
    if bias is not None:
        y = y + bias.to(torch.float32)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    if residual is not None:
        y = y + residual.reshape(y.shape).to(torch.float32)
    return y.to(out_dtype)


def _scaled_mm(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    sums = _accumulate(x.reshape(-1, x.shape[-1]), weight)
    y = epilogue(sums, x_scale, weight_scale, bias, residual, activation, out_dtype)
    return y.reshape(*x.shape[:-1], weight.shape[0])


observe = _define("observe(Tensor x) -> Tensor", _observe)
"""x [..., K] any float → per-channel absmax [K] float32. Empty x gives zeros."""

smoothing_scale = _define(
    "smoothing_scale(Tensor[] absmax, Tensor[] weights, Tensor[] index, int components, float alpha) -> Tensor",
    _smoothing_scale,
)
"""SmoothQuant's s = max|x|^α / max|W|^(1−α) for every component of tied channels (arXiv:2211.10438, eq. 4).

absmax [K] float32, weight [N, K] and index [K] int64 per linear; index names each channel's component,
1…components. Returns s [components + 1], float32 or float64. Entry 0 is 1: index 0 means "not scaled".
Channels that calibration never saw, or whose weights are all zero, get 1.
"""

rescale = _define("rescale(Tensor x, Tensor[] factors) -> Tensor", _rescale)
"""x times every factor (broadcast, finite, positive), computed in at least float32, in x's dtype."""

quantize = _define("quantize(Tensor x, Tensor[] factors, str mode, ScalarType dtype) -> (Tensor, Tensor)", _quantize)
"""x [..., K], rescaled by factors, → q [..., K] of `dtype` and scale float32: [...] per "row", [] per "tensor".

"row" is per-token for activations and per-channel for a weight [N, K].
"""

quantize_static = _define(
    "quantize_static(Tensor x, Tensor scale, Tensor[] factors, ScalarType dtype) -> Tensor", _quantize_static
)
"""x [..., K], rescaled by factors, → q [..., K] with a scale [] float32 known beforehand; saturates."""

static_scale = _define("static_scale(Tensor absmax, Tensor[] factors, ScalarType dtype) -> Tensor", _static_scale)
"""Calibrated absmax [K], rescaled by factors [K], → scale [] float32 for `quantize_static`."""

scaled_mm = _define(
    "scaled_mm(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, Tensor? residual,"
    " str? activation, ScalarType out_dtype) -> Tensor",
    _scaled_mm,
)
"""x [..., K] and weight [N, K], both int8 or fp8, → y [..., N] of out_dtype.

x_scale float32 is [...] (per-token) or [] (per-tensor), weight_scale [N] float32, bias [N], residual [..., N].
y = activation(x·weightᵀ · x_scale · weight_scale + bias) + residual; int8 sums are exact.
"""

REFERENCES: dict[torch._ops.OpOverload, Callable[..., object]] = {
    observe: _observe,
    smoothing_scale: _smoothing_scale,
    rescale: _rescale,
    quantize: _quantize,
    quantize_static: _quantize_static,
    static_scale: _static_scale,
    scaled_mm: _scaled_mm,
}
