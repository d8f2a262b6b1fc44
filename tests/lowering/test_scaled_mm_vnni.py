"""The AVX512-VNNI kernel equals the definition bit for bit; what it leaves to oneDNN, what its operator refuses."""

import re
from typing import Any

import pytest
import torch
from cpu_product_checks import HERE, ProductChecks, operands

from qcompile.lowering import cpu_library, scaled_mm_int8_cpu, unsigned
from qcompile.lowering import scaled_mm_vnni as kernel
from qcompile.lowering.target import Target

VNNI = Target("cpu", 0, frozenset({"avx512_vnni"}))
AMX = Target("cpu", 0, frozenset({"avx512_vnni", "amx_int8"}))

runs_here = pytest.mark.skipif(bool(kernel.runs_on(HERE)), reason=kernel.runs_on(HERE))


def constant(name: str) -> int:
    """A constant of the C++ source, written as a number or as one shifted by another."""
    source = (cpu_library.FOLDER / "scaled_mm_vnni.cpp").read_text()
    match = re.search(rf"constexpr \w+ {name} = (\d+)(?: << (\d+))?;", source)
    assert match is not None
    return int(match[1]) << int(match[2] or 0)


class TestVnni(ProductChecks):
    kernel = kernel
    many = 3 * constant("L2_SHARE") // 2048 + 5


@runs_here
@pytest.mark.parametrize("rows", [1, 20])
def test_no_channels_are_a_sum_of_nothing(rows: int) -> None:
    x, weight = torch.zeros(rows, 0, dtype=torch.uint8), torch.zeros(5, 0, dtype=torch.int8)
    bias = torch.randn(5)
    shift = unsigned.compensation(weight)
    y = torch.ops.qcompile_cpu.scaled_mm.default(
        x, weight, torch.ones(rows), torch.ones(5), shift, bias, None, torch.float32
    )
    assert torch.equal(y, bias.expand(rows, 5))


def raw(**changed: Any) -> tuple[Any, ...]:
    """Arguments of the operator itself."""
    x, weight = operands(5, 7, 16)
    named = {
        "x": unsigned.shifted(x), "weight": weight, "x_scale": torch.rand(5), "weight_scale": torch.rand(7),
        "compensation": unsigned.compensation(weight), "bias": torch.rand(7), "residual": torch.rand(5, 7),
        "dtype": torch.float32,
    }  # fmt: skip
    return tuple((named | changed).values())


@runs_here
def test_the_operator_has_a_schema_and_a_fake() -> None:
    torch.library.opcheck(torch.ops.qcompile_cpu.scaled_mm.default, raw())


@runs_here
@pytest.mark.parametrize(("changed", "named"), [
    ({"x": torch.zeros(5, 16, dtype=torch.int8)}, "x"),
    ({"x": torch.zeros(5, 15, dtype=torch.uint8)}, "weight \\[N, K\\]"),
    ({"weight": torch.zeros(16, 7, dtype=torch.int8).T}, "weight"),
    ({"x_scale": torch.rand(4)}, "x_scale"),
    ({"weight_scale": torch.rand(8)}, "weight_scale"),
    ({"bias": torch.rand(7).double()}, "bias"),
    ({"residual": torch.rand(5, 7).half()}, "residual"),
    ({"dtype": torch.float64}, "float32, bfloat16 or float16"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")  # fmt: skip
def test_the_operator_refuses_memory_that_it_would_misread(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(RuntimeError, match=named):
        torch.ops.qcompile_cpu.scaled_mm.default(*raw(**changed))


def test_amx_is_left_to_those_that_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled_mm_int8_cpu, "_multiplies_unsigned", lambda: True)
    weight = torch.empty(32, 64, dtype=torch.int8)
    few, many = (torch.empty(rows, 64, dtype=torch.int8) for rows in (kernel.FEW, kernel.FEW + 1))
    assert kernel.takes(AMX, few, weight) == kernel.takes(VNNI, many, weight) == ""
    assert "AMX" in kernel.takes(AMX, many, weight)
