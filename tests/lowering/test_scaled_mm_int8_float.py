"""int8 by float32 products, exact by their length."""

import pytest
import torch

from qcompile import ops
from qcompile.lowering import scaled_mm_int8_float as kernel
from qcompile.lowering.target import Target


def test_where_it_runs_and_what_it_takes() -> None:
    assert kernel.runs_on(Target("cuda", 70)) == ""
    assert kernel.runs_on(Target("cpu"))
    x = torch.empty(2, 4, dtype=torch.int8)
    assert kernel.takes(Target("cuda", 70), x, x) == ""
    assert kernel.takes(Target("cuda", 70), x.to(torch.float8_e5m2), x)


@pytest.mark.parametrize("channels", [1, 1023, 1024, 1025, 5000])
def test_the_largest_sums_are_exact(channels: int) -> None:
    x = torch.full((2, channels), -128, dtype=torch.int8)
    x[1] = 127
    weight = torch.full((3, channels), -128, dtype=torch.int8)
    weight[1, ::2] = 1
    y = kernel.scaled_mm(x, weight, torch.ones(2), torch.ones(3), None, None, None, torch.float64)
    exact = (x.long() @ weight.long().T).float().double()  # the epilogue is float32
    assert torch.equal(y, exact)
    assert kernel.PIECE * 128**2 <= 2**24 < (kernel.PIECE + 1) * 128**2


@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 3)], ids=str)
def test_it_equals_the_definition(leading: tuple[int, ...]) -> None:
    x = torch.randint(-127, 128, (*leading, 1500), dtype=torch.int8)
    weight = torch.randint(-128, 128, (17, 1500), dtype=torch.int8)
    args = (x, weight, torch.tensor(1e-3), torch.rand(17), torch.randn(17), torch.randn(*leading, 17), "silu")
    assert torch.equal(kernel.scaled_mm(*args, torch.float16), ops.scaled_mm(*args, torch.float16))
