"""The u8×s8 kernel against the definition: bit-equal sums, whatever the shape or the values."""

import pytest
import torch

from qcompile.lowering import scaled_mm_int8_cpu as kernel
from qcompile.lowering.scaled_mm_reference import scaled_mm as reference


def operands(m: int, n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    return x, weight, torch.rand(m, generator=generator) + 0.1, torch.rand(n, generator=generator) + 0.1


@pytest.mark.parametrize("m", [0, 1, 15, 17, 129])
@pytest.mark.parametrize(("n", "k"), [(1, 2), (15, 17), (33, 129), (64, 4096)])
def test_equals_the_definition(m: int, n: int, k: int) -> None:
    x, weight, x_scale, weight_scale = operands(m, n, k)
    bias = torch.linspace(-1, 1, n)
    args = (x, weight, x_scale, weight_scale, bias, None, None, torch.float32)
    assert torch.equal(kernel.scaled_mm(*args), reference(*args))


@pytest.mark.parametrize(("x_value", "w_value"), [(127, 127), (-127, 127), (127, -128), (-127, -128), (0, -128)])
def test_extreme_values_do_not_saturate(x_value: int, w_value: int) -> None:
    x = torch.full((3, 4096), x_value, dtype=torch.int8)
    weight = torch.full((5, 4096), w_value, dtype=torch.int8)
    one = torch.ones(())
    y = kernel.scaled_mm(x, weight, one, torch.ones(5), None, None, None, torch.float64)
    assert (y == x_value * w_value * 4096).all()


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_epilogue_and_leading_dimensions(activation: str | None, out_dtype: torch.dtype) -> None:
    x, weight, x_scale, weight_scale = operands(6, 8, 16)
    residual = torch.randn(2, 3, 8, dtype=out_dtype)
    scales = (x_scale.reshape(2, 3) * 1e-3, weight_scale * 1e-3)
    args = (x.reshape(2, 3, 16), weight, *scales, None, residual, activation, out_dtype)
    y = kernel.scaled_mm(*args)
    assert y.shape == (2, 3, 8)
    assert y.dtype == out_dtype
    assert torch.equal(y, reference(*args))


def test_longest_k_stays_within_int32() -> None:
    assert 255 * 128 * 1 <= 2**31
    assert 255 * 127 * kernel.LARGEST_K < 2**31
    assert kernel.takes(torch.empty(1, 8, dtype=torch.int8), torch.empty(1, kernel.LARGEST_K, dtype=torch.int8)) == ""
    assert kernel.takes(torch.empty(1, 8, dtype=torch.int8), torch.empty(1, kernel.LARGEST_K + 1, dtype=torch.int8))


def test_the_fake_says_what_the_kernel_gives() -> None:
    x = torch.randint(0, 255, (5, 16), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (7, 16), dtype=torch.int8)
    torch.library.opcheck(torch.ops.qcompile_cpu.int_mm.default, (x, weight))
