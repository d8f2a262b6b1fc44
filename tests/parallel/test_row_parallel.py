"""A row parallel linear in a group of one is the linear itself; in larger ones: end_to_end/test_tensor_parallel.py."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import qcompile  # noqa: F401  (defines the dialect)
from qcompile.parallel.row_parallel import RowParallelLinear
from qcompile.quantized_linear import QuantizedLinear

DTYPES = [torch.int8, torch.float8_e4m3fn]


@pytest.fixture
def group() -> Iterator[str]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def linear(dtype: torch.dtype, static: bool) -> QuantizedLinear:
    weight = (torch.randn(24, 16) * 50).clamp(-127, 127).round().to(dtype)
    scale = torch.tensor([0.02]) if static else None
    return QuantizedLinear(weight, torch.rand(24) + 0.5, torch.randn(24), scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("load", [torch.float32, torch.bfloat16], ids=str)
def test_alone_it_is_the_linear(group: str, dtype: torch.dtype, static: bool, load: torch.dtype) -> None:
    whole, x = linear(dtype, static), torch.randn(2, 3, 16, dtype=load)
    found = RowParallelLinear(whole, group)(x)
    assert found.dtype == load
    assert torch.equal(found, whole(x))


@pytest.mark.filterwarnings("ignore:fp8 on CPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_captured_it_is_two_products_of_the_dialect_around_a_sum(group: str, dtype: torch.dtype) -> None:
    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = RowParallelLinear(linear(dtype, False), group)
            self.up = linear(dtype, False)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(torch.nn.functional.silu(x)) + self.down(x)

    model, x = Residual(), torch.randn(2, 3, 16, dtype=torch.bfloat16)
    whole = Residual()
    whole.up, whole.down = model.up, model.down.linear  # type: ignore[assignment]
    options = {"inner": "eager", "verify": True}
    with torch.no_grad():
        expected = torch.compile(whole, backend="w8a8", options=options)(x)
        found = torch.compile(model, backend="w8a8", options=options)(x)
    assert torch.equal(found, expected), "the residual is added before the one rounding to bfloat16, as in one process"
