"""What is around our own products: operands made contiguous, and what a kernel does not do done after it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile import ops, products
from qcompile.lowering.cpu_product import scaled_mm_by, takes_int8


def by_definition(seen: list[tuple[Any, ...]]) -> Any:
    """scaled_mm around a kernel that computes the definition, and notes what it was given."""

    def multiply(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, *rest: Any) -> Tensor:
        seen.append((x, weight, x_scale, weight_scale, *rest))
        bias, residual, out_dtype = rest
        sums = products.accumulate(x, weight)
        return products.epilogue(sums, x_scale, weight_scale, bias, residual, None, out_dtype)

    return scaled_mm_by(multiply)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("same", [True, False])
def test_a_kernel_gets_what_it_can_do(dtype: torch.dtype, activation: str | None, same: bool) -> None:
    x = torch.randint(-127, 128, (2, 3, 16), dtype=torch.int8)
    weight = torch.randint(-127, 128, (16, 5), dtype=torch.int8).T
    residual = torch.randn(2, 3, 5).to(dtype if same else torch.bfloat16)
    bias = torch.randn(5, 2)[:, 0].to(dtype)
    args = x.transpose(0, 1), weight, torch.rand(3, 2), torch.rand(5), bias, residual.transpose(0, 1), activation, dtype
    seen: list[tuple[Any, ...]] = []
    assert torch.equal(by_definition(seen)(*args), ops.scaled_mm(*args))
    *operands, out_dtype = seen[0]
    assert all(one.is_contiguous() for one in operands if one is not None)
    whole = activation is None and dtype != torch.float64 and same
    assert (operands[-1] is not None) == whole
    assert out_dtype == (dtype if whole else torch.float32)
    assert operands[4].dtype == torch.float32


def test_what_is_taken() -> None:
    int8 = torch.empty(2, 9, dtype=torch.int8)
    assert takes_int8(int8, int8, 9) == ""
    assert takes_int8(int8, int8, 8) == "needs K ≤ 8 to stay within int32, got 9"
    assert takes_int8(int8.float(), int8, 9) == "needs int8, got torch.float32"
