"""int8 through cuBLAS: padded where it must be, and the same numbers. torch._int_mm on a CPU stands in for CUDA's."""

from typing import Any

import pytest
import torch

from qcompile import ops
from qcompile.lowering import scaled_mm_int_mm as kernel
from qcompile.lowering.target import Target


@pytest.mark.parametrize(
    ("target", "runs"),
    [(Target("cuda", 75), True), (Target("cuda", 90), True), (Target("cuda", 70), False), (Target("cpu"), False)],
    ids=str,
)
def test_where_it_runs(target: Target, runs: bool) -> None:
    assert (kernel.runs_on(target) == "") is runs


@pytest.mark.parametrize(("n", "k", "takes"), [(8, 16, True), (12, 16, False), (8, 12, False), (8, 0, False)])
def test_what_it_takes(n: int, k: int, takes: bool) -> None:
    weight = torch.empty(n, k, dtype=torch.int8)
    assert (kernel.takes(Target("cuda", 75), weight[:1], weight) == "") is takes
    assert kernel.takes(Target("cuda", 75), weight.to(torch.float8_e4m3fn), weight)


@pytest.mark.parametrize("leading", [(), (0,), (1,), (16,), (17,), (2, 3)], ids=str)
def test_it_equals_the_definition(leading: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = torch._int_mm

    def watched(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append((x.shape[0], x.is_contiguous(), weight.t().is_contiguous()))
        # A CPU's own form of _int_mm may saturate; its numbers are not what is tested here.
        return (x.long() @ weight.long()).int()

    assert real is not None
    monkeypatch.setattr(torch, "_int_mm", watched)
    x = torch.randint(-127, 128, (*leading, 64), dtype=torch.int8)
    weight = torch.randint(-128, 128, (24, 64), dtype=torch.int8)
    args = (x, weight, torch.rand(leading), torch.rand(24), torch.randn(24), torch.randn(*leading, 24), "gelu")
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(kernel.scaled_mm(*args, dtype), ops.scaled_mm(*args, dtype))
    rows, *layouts = seen[0]
    assert rows >= kernel.FEWEST_ROWS, "cuBLAS takes more than 16 rows only"
    assert all(layouts)
