"""Sums are exact where integers are, and every way to sum gives the same operators."""

import pytest
import torch
from torch import Tensor

from qcompile import products


def integers(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 7), (17, 129, 15), (4, 4096, 8)], ids=str)
def test_int8_sums_are_exact(shape: tuple[int, int, int]) -> None:
    rows, channels, columns = shape
    x, weight = integers(rows, channels), integers(columns, channels)
    assert torch.equal(products.accumulate(x, weight).long(), x.long() @ weight.long().T)


@pytest.mark.parametrize("channels", [4095, 4096])
@pytest.mark.parametrize(("left", "right"), [(127, 127), (-127, 127), (-127, -127), (127, 125)])
def test_int8_sums_are_exact_at_the_extremes(channels: int, left: int, right: int) -> None:
    """Sums of 26 significant bits, more than float32 holds."""
    x = torch.full((2, channels), left, dtype=torch.int8)
    weight = torch.full((3, channels), right, dtype=torch.int8)
    assert (products.accumulate(x, weight) == channels * left * right).all()


def test_operators_take_any_number_of_leading_dimensions() -> None:
    x, weight, scale = integers(2, 3, 16), integers(8, 16), torch.rand(8) + 0.5
    rest = (torch.rand(2, 3), scale, torch.randn(8), torch.randn(2, 3, 8), "silu", torch.bfloat16)
    whole = products.scaled_mm_of(products.accumulate)(x, weight, *rest)
    sums = products.sums_of(products.accumulate)(x, weight)
    assert whole.shape == sums.shape == (2, 3, 8)
    assert torch.equal(products.from_sums(sums, *rest), whole)
