"""The tolerances bite: what is plainly wrong is further off than any row allows, and the message names the row."""

import re

import pytest
import torch
from tolerances import TOLERANCES, assert_close, row_for
from torch import Tensor

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def result(row: str) -> Tensor:
    """What a linear might give: Gaussian, [M, N] with N = M so that it can be transposed, in the row's dtype."""
    dtype = DTYPES.get(row.partition("/")[2], torch.float32)
    return torch.randn(48, 48, dtype=torch.float64).to(dtype)


def one_channel_off(y: Tensor, factor: float) -> Tensor:
    wrong = y.clone()
    wrong[:, 0] *= factor
    return wrong


WRONG = {
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "transposed": lambda y: y.T,
    "negated": lambda y: -y,
    "twice": lambda y: 2 * y,
    "one channel lost": lambda y: one_channel_off(y, 0),
    "rolled": lambda y: y.roll(1, -1),
    "all channels off by a quarter": lambda y: 1.25 * y,
    "not a number": lambda y: one_channel_off(y, float("nan")),
}


@pytest.mark.parametrize("row", TOLERANCES)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_results_fail(row: str, wrong: str) -> None:
    y = result(row)
    with pytest.raises(AssertionError, match=re.escape(f"TOLERANCES[{row!r}]")):
        assert_close(row, actual=WRONG[wrong](y), expected=y)


# 2% on one channel of N is 0.02 / √N overall. What exact rewrites are held to is far below that. Rows of quantization
# and of 16-bit floats must let more than that pass as noise, so tests that use them also compare with integers by hand,
# or in float64.
FINE = [row for row in TOLERANCES if TOLERANCES[row].relative < 0.02 / 48**0.5]
COARSE = [row for row in TOLERANCES if row not in FINE]


@pytest.mark.parametrize("row", FINE)
def test_one_channel_off_by_2_percent_fails(row: str) -> None:
    y = result(row)
    with pytest.raises(AssertionError, match="error"):
        assert_close(row, actual=one_channel_off(y, 1.02), expected=y)


@pytest.mark.parametrize("row", COARSE)
def test_a_coarse_row_is_coarse_for_a_reason(row: str) -> None:
    assert "int8" in row or "fp8" in row or "float16" in row


@pytest.mark.parametrize("row", TOLERANCES)
def test_right_results_pass(row: str) -> None:
    y = result(row)
    assert_close(row, actual=y.clone(), expected=y)
    noise = torch.randn_like(y) * (TOLERANCES[row].relative / 2)
    if y.dtype in (torch.float64, torch.float32):
        assert_close(row, actual=y + y.abs().mean() * noise, expected=y)


def test_shape_and_dtype_must_agree() -> None:
    y = torch.randn(3, 4)
    with pytest.raises(AssertionError, match=re.escape("shape (4, 3) != (3, 4)")):
        assert_close("rewrite/float32", actual=y.T, expected=y)
    with pytest.raises(AssertionError, match=re.escape("dtype torch.float64 != torch.float32")):
        assert_close("rewrite/float32", actual=y.double(), expected=y)


def test_infinities_must_be_equal() -> None:
    y = torch.tensor([1.0, float("inf"), -2.0])
    assert_close("rewrite/float32", actual=y.clone(), expected=y)
    for wrong in ([1.0, 3.0, -2.0], [1.0, float("-inf"), -2.0], [float("inf"), float("inf"), -2.0]):
        with pytest.raises(AssertionError, match="error"):
            assert_close("rewrite/float32", actual=torch.tensor(wrong), expected=y)


def test_an_expected_zero_allows_only_zero() -> None:
    zero = torch.zeros(4)
    assert_close("fp8_e5m2/linear", actual=zero.clone(), expected=zero)
    with pytest.raises(AssertionError, match="error"):
        assert_close("fp8_e5m2/linear", actual=zero + 1e-20, expected=zero)


@pytest.mark.parametrize("row", TOLERANCES)
def test_every_row_gives_its_reason(row: str) -> None:
    tolerance = TOLERANCES[row]
    assert 0 < tolerance.relative < 0.2
    assert len(tolerance.reason.split()) >= 5


def test_rows_are_named_by_kind_and_dtype() -> None:
    for kind in ("smooth", "rewrite"):
        for dtype in DTYPES.values():
            assert row_for(kind, dtype) in TOLERANCES
