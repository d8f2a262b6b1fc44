"""The dialect's products with experts: each row by the matrix of the expert it was routed to."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile import ops
from qcompile.grouped_ops import grouped_linear, groups, scaled_grouped_mm

# Rows of each expert: none at all, none at either end or between, several.
ROUTINGS = [(0, 0, 0), (0, 3, 0), (2, 0, 5), (1, 1, 1), (0, 0, 7)]
N, K = 6, 16


def offsets_of(rows: tuple[int, ...]) -> Tensor:
    return torch.tensor(rows).cumsum(0).to(torch.int32)


def expert_of(rows: tuple[int, ...]) -> Tensor:
    return torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))


def quantized(rows: tuple[int, ...], mode: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, x_scale and weight_scale, in the order of the operator."""
    x, x_scale = ops.quantize(torch.randn(sum(rows), K), [], mode, dtype)
    weight, weight_scale = ops.quantize(torch.randn(len(rows), N, K), [], "row", dtype)
    return x, weight, x_scale, weight_scale


@pytest.mark.parametrize("rows", ROUTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_each_row_meets_its_experts_matrix(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(sum(rows), K).double(), torch.randn(len(rows), N, K).double()
    y = grouped_linear(x, weight, offsets_of(rows).to(dtype))
    expected = torch.einsum("sk,snk->sn", x, weight[expert_of(rows)])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", ROUTINGS, ids=str)
@pytest.mark.parametrize("mode", ["row", "tensor"])
def test_int8_sums_are_exact(rows: tuple[int, ...], mode: str) -> None:
    x, weight, x_scale, weight_scale = quantized(rows, mode, torch.int8)
    y = scaled_grouped_mm(x, weight, x_scale, weight_scale, offsets_of(rows), torch.float32)
    chosen = expert_of(rows)
    sums = (x.long()[:, None] * weight.long()[chosen]).sum(-1)
    assert weight_scale.shape == (len(rows), N)
    assert torch.equal(y, sums.float() * (x_scale.reshape(-1, 1) * weight_scale[chosen]))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_expert_is_a_linear(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    x, weight, x_scale, weight_scale = quantized((5,), "row", dtype)
    y = scaled_grouped_mm(x, weight, x_scale, weight_scale, offsets_of((5,)), out_dtype)
    single = ops.scaled_mm(x, weight[0], x_scale, weight_scale[0], None, None, None, out_dtype)
    assert torch.equal(y, single)


def test_rows_of_nobody_are_zeros() -> None:
    x, weight = torch.randn(6, K), torch.randn(2, N, K)
    y = grouped_linear(x, weight, offsets_of((1, 3)))
    assert not y[4:].any()
    assert y[:4].all()


def test_groups_stay_within_the_rows() -> None:
    assert list(groups(torch.tensor([2, 2, 9]), 5)) == [(0, slice(0, 2)), (2, slice(2, 5))]


CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "float": (grouped_linear, (torch.randn(7, K).bfloat16(), torch.randn(3, N, K).bfloat16(), offsets_of((2, 0, 5)))),
    "int8": (scaled_grouped_mm, (*quantized((2, 0, 5), "row", torch.int8), offsets_of((2, 0, 5)), torch.bfloat16)),
    "per tensor": (scaled_grouped_mm, (*quantized((1, 1), "tensor", torch.int8), offsets_of((1, 1)), torch.float32)),
}


@pytest.mark.parametrize("name", CALLS)
def test_schema_and_fake_agree_with_the_function(name: str) -> None:
    torch.library.opcheck(*CALLS[name])
