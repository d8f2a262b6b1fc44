"""int8 by float32 products, exact by their length; few tokens on a CPU by a reduction."""

import pytest
import torch

from qcompile import ops
from qcompile.lowering import scaled_mm_int8_float as kernel
from qcompile.lowering.target import Target


def test_where_it_runs_and_what_it_takes() -> None:
    assert kernel.runs_on(Target("cuda", 70)) == kernel.runs_on(Target("cpu")) == ""
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


@pytest.mark.parametrize("rows", range(7))
@pytest.mark.parametrize("channels", [1, 1024, 1025])
def test_few_tokens_and_many(rows: int, channels: int) -> None:
    x = torch.randint(-128, 128, (rows, channels), dtype=torch.int8)
    weight = torch.randint(-128, 128, (5, channels), dtype=torch.int8)
    assert torch.equal(kernel.accumulate(x, weight), (x.long() @ weight.long().T).int())


@pytest.mark.parametrize(("rows", "reduced"), [(1, True), (kernel.FEW, True), (kernel.FEW + 1, False)])
def test_few_tokens_need_no_converted_weights(rows: int, reduced: bool) -> None:
    """What Inductor gets: a reduction, which it fuses with the conversion, or a product of whole matrices."""
    x, weight = torch.ones(rows, 8, dtype=torch.int8), torch.ones(5, 8, dtype=torch.int8)
    traced = torch.fx.experimental.proxy_tensor.make_fx(kernel.accumulate)(x, weight)
    products = [node for node in traced.graph.nodes if node.target in (torch.ops.aten.mm.default,)]
    assert (not products) == reduced


@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 3)], ids=str)
def test_it_equals_the_definition(leading: tuple[int, ...]) -> None:
    x = torch.randint(-127, 128, (*leading, 1500), dtype=torch.int8)
    weight = torch.randint(-128, 128, (17, 1500), dtype=torch.int8)
    args = (x, weight, torch.tensor(1e-3), torch.rand(17), torch.randn(17), torch.randn(*leading, 17), "silu")
    assert torch.equal(kernel.scaled_mm(*args, torch.float16), ops.scaled_mm(*args, torch.float16))
