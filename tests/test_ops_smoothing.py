"""The dialect's smoothing factors: equation 4, and the search for the best strength."""


import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from qcompile import ops
from qcompile.validate import relative_error

LARGEST = 127  # of an int8 operand's magnitude


def smoothing(absmax: Tensor, weight: Tensor, alpha: float = 0.5, index: Tensor | None = None) -> Tensor:
    index = torch.arange(1, weight.shape[1] + 1) if index is None else index
    return ops.smoothing_scale([absmax], [weight], [index], int(index.max()), alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_scale_is_equation_4(alpha: float) -> None:
    absmax, weight = torch.rand(16) * 10 + 0.1, torch.randn(8, 16)
    scale = smoothing(absmax, weight, alpha)
    expected = absmax.double() ** alpha / weight.double().abs().amax(0) ** (1 - alpha)
    assert_close("rewrite/float32", actual=scale[1:], expected=expected.float())
    assert scale[0] == 1


def test_smoothing_scale_of_unseen_channels_is_one() -> None:
    absmax, weight = torch.tensor([4.0, 0.0, 4.0, 0.0]), torch.ones(2, 4)
    weight[:, 2:] = 0
    assert smoothing(absmax, weight).tolist() == [1, 2, 1, 1, 1]


@pytest.mark.parametrize(("absmax", "weight"), [(1e30, 1e-30), (1e-30, 1e30), (1e-44, 1.0), (3e38, 1e-44)])
def test_smoothing_scale_stays_in_range(absmax: float, weight: float) -> None:
    scale = smoothing(torch.tensor([absmax]), torch.tensor([[weight]]))[1].item()
    assert ops.SMALLEST_FACTOR * 0.999 <= scale <= ops.LARGEST_FACTOR * 1.001


def test_smoothing_scale_takes_the_largest_over_tied_channels_and_linears() -> None:
    first, second = torch.ones(2, 4), torch.ones(3, 4)
    second[0, 1] = 16
    tied = torch.tensor([1, 1, 2, 0])
    absmax = [torch.tensor([1.0, 64.0, 9.0, 5.0]), torch.tensor([4.0, 4.0, 4.0, 4.0])]
    scale = ops.smoothing_scale(absmax, [first, second], [tied, tied], 2, 0.5)
    assert scale.tolist() == [1, (64 / 16) ** 0.5, 3]


def search(x: Tensor, weight: Tensor, mode: str = "row", dtype: torch.dtype = torch.int8) -> Tensor:
    index = torch.arange(1, weight.shape[1] + 1)
    absmax, rows = ops.observe(x)
    return ops.search_smoothing_scale([absmax], [weight], [index], [rows], weight.shape[1], mode, dtype)


def quantized_error(
    x: Tensor, weight: Tensor, scale: Tensor, mode: str = "row", dtype: torch.dtype = torch.int8
) -> float:
    """Relative error of a smoothed and quantized linear, with the dialect's own operators and exact sums."""
    weight_q, weight_scale = ops.quantize(weight, [scale], "row", dtype)
    if mode == "static":
        x_scale = ops.static_scale(x.abs().amax(0), [1 / scale], dtype)
        x_q = ops.quantize_static(x, x_scale, [1 / scale], dtype)
    else:
        x_q, x_scale = ops.quantize(x, [1 / scale], mode, dtype)
    y = ops.scaled_mm(x_q, weight_q, x_scale, weight_scale, None, None, None, torch.float32)
    return relative_error(y, x @ weight.T)


@pytest.mark.parametrize("mode", ["row", "tensor", "static"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("outliers", [1.0, 10.0, 100.0])
def test_the_search_takes_the_best_candidate(mode: str, dtype: torch.dtype, outliers: float) -> None:
    x, weight = torch.randn(64, 32), torch.randn(48, 32)
    x[:, 5] *= outliers
    chosen = search(x, weight, mode, dtype)[1:]
    absmax = x.abs().amax(0)
    candidates = [torch.ones(32), *(smoothing(absmax, weight, alpha)[1:] for alpha in ops.ALPHAS)]
    errors = [quantized_error(x, weight, scale, mode, dtype) for scale in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    assert torch.equal(chosen, candidates[best])
    assert len(set(errors)) > 1


def test_the_search_leaves_alone_what_smoothing_would_hurt() -> None:
    """Weights with outliers of their own, activations without: moving range into the weights can only hurt."""
    x, weight = torch.randn(64, 32).sign() * (1 + torch.rand(64, 32) / 10), torch.randn(48, 32)
    weight[:, 3] *= 100
    x[:, 3] *= 2
    assert search(x, weight).tolist() != smoothing(x.abs().amax(0), weight, 0.9).tolist()
    chosen = quantized_error(x, weight, search(x, weight)[1:])
    assert chosen <= quantized_error(x, weight, torch.ones(32))
    assert chosen <= quantized_error(x, weight, smoothing(x.abs().amax(0), weight)[1:])


def test_the_search_without_activations_smooths_nothing() -> None:
    assert search(torch.zeros(4, 8), torch.randn(3, 8)).tolist() == [1.0] * 9


def test_the_search_weighs_linears_alike() -> None:
    """Of two linears that share a scale, the one with larger outputs does not speak louder."""
    x, index = torch.randn(64, 32), torch.arange(1, 33)
    x[:, 5] *= 100
    quiet, loud = torch.randn(48, 32), torch.randn(48, 32) * 1000
    absmax, rows = ops.observe(x)
    both = ops.search_smoothing_scale([absmax] * 2, [quiet, loud], [index] * 2, [rows] * 2, 32, "row", torch.int8)
    scaled = ops.search_smoothing_scale(
        [absmax] * 2, [quiet * 1000, loud], [index] * 2, [rows] * 2, 32, "row", torch.int8
    )
    assert both.isfinite().all()
    assert scaled.isfinite().all()
    alone = [quantized_error(x, w, both[1:]) for w in (quiet, loud)]
    assert max(alone) < quantized_error(x, quiet, torch.ones(32))
