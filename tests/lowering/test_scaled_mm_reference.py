"""The definition: exact for int8, float32 for fp8, and it runs anywhere."""

import pytest
import torch

from qcompile import ops
from qcompile.lowering import scaled_mm_reference as reference
from qcompile.lowering.target import Target


@pytest.mark.parametrize("target", [Target("cpu"), Target("cuda", 70), Target("cuda", 90), Target("xpu")])
def test_runs_and_takes_anything(target: Target) -> None:
    assert reference.runs_on(target) == ""
    assert reference.takes(target, torch.empty(1, 1), torch.empty(1, 1)) == ""


@pytest.mark.parametrize("k", [1, 17, 1041, 8192])
def test_int8_sums_equal_int64_sums(k: int) -> None:
    x = torch.randint(-127, 128, (5, k), dtype=torch.int8)
    weight = torch.randint(-128, 128, (3, k), dtype=torch.int8)
    y = reference.scaled_mm(x, weight, torch.ones(()), torch.ones(3), None, None, None, torch.float64)
    exact = x.to(torch.int64) @ weight.to(torch.int64).T
    assert torch.equal(y, exact.to(torch.float32).to(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_the_product_of_the_dequantized_values(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 16).to(dtype), torch.randn(8, 16).to(dtype)
    x_scale, weight_scale = torch.rand(4), torch.rand(8)
    y = reference.scaled_mm(x, weight, x_scale, weight_scale, None, None, None, torch.float32)
    expected = (x.double() * x_scale[:, None]) @ (weight.double() * weight_scale[:, None]).T
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-6)


def test_it_is_the_definition() -> None:
    assert reference.scaled_mm is ops.REFERENCES[ops.scaled_mm]
    assert reference.accumulate is ops.REFERENCES[ops.accumulate]
