"""Weights quantized in parts are what they are as a whole."""

import pytest
import torch
from torch import Tensor

from qcompile import ops
from qcompile.quantize_weight import parts, quantize_weight


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "BLOCK", 100)


def turned(weight: Tensor) -> Tensor:
    """The same values, rows and columns exchanged in memory."""
    return weight.transpose(-2, -1).contiguous().transpose(-2, -1)


@pytest.mark.parametrize("scale_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [(17, 30), (3, 17, 30), (2, 3, 4, 7), (1, 300), (0, 5), (4, 0), (2, 0, 5)], ids=str)
def test_parts_are_the_whole(shape: tuple[int, ...], dtype: torch.dtype, scale_dtype: torch.dtype | None) -> None:
    weight = torch.randn(shape).bfloat16()
    factors = [torch.rand(shape[-1]) + 0.5, torch.rand(shape[-2], 1) + 0.5]
    expected = ops.quantize(weight, factors, "row", dtype, scale_dtype)
    for same in (weight, turned(weight)):
        found = quantize_weight(same, factors, "row", dtype, scale_dtype)
        assert all(map(torch.equal, found, expected))
        assert found[0].stride() == torch.empty_like(same).stride(), "what the operator's fake says"


def test_a_part_is_no_larger_than_a_block() -> None:
    sizes = [rows.numel() for _, rows, _ in parts(torch.randn(3, 17, 30), [])]
    assert sum(sizes) == 3 * 17 * 30
    assert max(sizes) == 90
