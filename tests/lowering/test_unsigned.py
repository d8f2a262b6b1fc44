"""Signed activations as unsigned ones: the shift and what it adds."""

import pytest
import torch

from qcompile.lowering import unsigned
from qcompile.lowering.target import Target

VNNI = Target("cpu", 0, frozenset({"avx512_vnni"}))


def test_the_compensation_undoes_the_shift() -> None:
    x = torch.arange(-127, 128, dtype=torch.int8).repeat(2, 1)
    weight = torch.randint(-128, 128, (7, 255), dtype=torch.int8)
    sums = unsigned.shifted(x).long() @ weight.long().T - unsigned.compensation(weight)
    assert torch.equal(sums, x.long() @ weight.long().T)


def test_shifting_is_one_to_one() -> None:
    x = torch.arange(-128, 128).to(torch.int8)
    assert unsigned.shifted(x).dtype == torch.uint8
    assert torch.equal(unsigned.shifted(x).long(), torch.arange(256))


def test_the_largest_k_is_the_largest() -> None:
    assert unsigned.LARGEST_K * 255 * 128 < 2**31 <= (unsigned.LARGEST_K + 1) * 255 * 128


@pytest.mark.parametrize(("dtype", "k", "reason"), [
    (torch.int8, unsigned.LARGEST_K, ""),
    (torch.int8, unsigned.LARGEST_K + 1, "needs K ≤"),
    (torch.float8_e4m3fn, 16, "needs int8"),
])  # fmt: skip
def test_what_it_takes(dtype: torch.dtype, k: int, reason: str) -> None:
    x, weight = torch.empty(1, k, dtype=dtype), torch.empty(1, k, dtype=dtype)
    found = unsigned.takes(VNNI, x, weight)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)
