"""The AVX512-VNNI kernel equals the definition bit for bit; what it leaves to oneDNN."""

import re

import pytest
import torch
from cpu_product_checks import ProductChecks
from torch import Tensor

from qcompile.lowering import cpu_library, scaled_mm_int8_cpu, unsigned
from qcompile.lowering import scaled_mm_vnni as kernel
from qcompile.lowering.target import Target

VNNI = Target("cpu", 0, frozenset({"avx512_vnni"}))
AMX = Target("cpu", 0, frozenset({"avx512_vnni", "amx_int8"}))


def constant(name: str) -> int:
    """A constant of the C++ source, written as a number or as one shifted by another."""
    source = (cpu_library.FOLDER / "scaled_mm_vnni.cpp").read_text()
    match = re.search(rf"constexpr \w+ {name} = (\d+)(?: << (\d+))?;", source)
    assert match is not None
    return int(match[1]) << int(match[2] or 0)


class TestVnni(ProductChecks):
    kernel = kernel
    operator = "scaled_mm"
    many = 3 * constant("L2_SHARE") // 2048 + 5

    @staticmethod
    def as_read(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
        return {"x": unsigned.shifted(x), "compensation": unsigned.compensation(weight)}

    def test_signed_activations_are_not_for_it(self) -> None:
        with pytest.raises(RuntimeError, match="needs x contiguous, of its dtype"):
            self.raw(x=torch.zeros(5, 16, dtype=torch.int8))


def test_amx_is_left_to_those_that_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled_mm_int8_cpu, "_multiplies_unsigned", lambda: True)
    weight = torch.empty(32, 64, dtype=torch.int8)
    few, many = (torch.empty(rows, 64, dtype=torch.int8) for rows in (kernel.FEW, kernel.FEW + 1))
    assert kernel.takes(AMX, few, weight) == kernel.takes(VNNI, many, weight) == ""
    assert "AMX" in kernel.takes(AMX, many, weight)
