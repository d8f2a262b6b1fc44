"""The AVX512-VNNI kernel equals the definition bit for bit, in each of its forms and at their edges."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile import ops
from qcompile.lowering import cpu_library, scaled_mm_int8_cpu, unsigned
from qcompile.lowering import scaled_mm_vnni as kernel
from qcompile.lowering.target import Target, detect

HERE = detect(torch.device("cpu"))
VNNI = Target("cpu", 0, frozenset({"avx512_vnni"}))
AMX = Target("cpu", 0, frozenset({"avx512_vnni", "amx_int8"}))

runs_here = pytest.mark.skipif(bool(kernel.runs_on(HERE)), reason=kernel.runs_on(HERE))


def operands(rows: int, columns: int, channels: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(-127, 128, (rows, channels), dtype=torch.int8)
    return x, torch.randint(-128, 128, (columns, channels), dtype=torch.int8)


def arguments(
    rows: int, columns: int, channels: int, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, ...]:
    """Those of scaled_mm. options: per_token, bias, residual, activation."""
    return (
        *operands(rows, columns, channels),
        torch.rand(rows) * 1e-2 if options.get("per_token", True) else torch.tensor(3e-3),
        torch.rand(columns) * 1e-2,
        torch.randn(columns).to(dtype) if options.get("bias") else None,
        torch.randn(rows, columns).to(dtype) if options.get("residual") else None,
        options.get("activation"),
        dtype,
    )


def assert_equal(args: tuple[Any, ...]) -> None:
    actual, expected = kernel.scaled_mm(*args), ops.scaled_mm(*args)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected), f"{int((actual != expected).sum())} of {expected.numel()} differ"


@runs_here
@pytest.mark.parametrize("rows", [0, *range(1, 35), 47, 48, 49, 63, 64, 65, 100, 130])
@pytest.mark.parametrize(("columns", "channels"), [(1, 1), (13, 7), (16, 64), (37, 130), (50, 257), (12, 3)])
def test_every_number_of_tokens(rows: int, columns: int, channels: int) -> None:
    options = {"per_token": rows % 3 > 0, "bias": rows % 2 > 0, "residual": rows % 5 > 1}
    assert_equal(arguments(rows, columns, channels, **options))


@runs_here
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 11, 16, 33])
@pytest.mark.parametrize("channels", [2816, 4095, 4096, 8192, 11008])
def test_rows_that_alias_in_the_cache_and_tokens_that_do_not_fit_it(rows: int, channels: int) -> None:
    assert_equal(arguments(rows, 29, channels, bias=True))


@runs_here
def test_more_tokens_than_fit_the_second_level_cache() -> None:
    rows = 3 * kernel_constant("L2_SHARE") // 2048 + 5
    assert rows > 700
    assert_equal(arguments(rows, 26, 2048))


@runs_here
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [
    {}, {"bias": True}, {"residual": True}, {"bias": True, "residual": True}, {"activation": "relu"},
    {"bias": True, "residual": True, "activation": "gelu_tanh"}, {"per_token": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_every_epilogue_and_dtype(rows: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_equal(arguments(rows, 21, 70, dtype, **options))


@runs_here
@pytest.mark.parametrize("leading", [(2, 3), (1, 1, 4), ()], ids=str)
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    count = torch.Size(leading).numel()
    x, weight, x_scale, *rest = arguments(count, 9, 33, bias=True, residual=True)
    rest[2] = rest[2].reshape(*leading, 9)
    assert_equal((x.reshape(*leading, 33), weight, x_scale.reshape(leading), *rest))


@runs_here
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-40, 65519.9, 1e39, -0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_numbers_at_the_edge_of_a_dtype(value: float, dtype: torch.dtype) -> None:
    """One product of 1 × 1 with that scale: the rounding is torch's, subnormal numbers and NaN included."""
    one = torch.ones(1, 1, dtype=torch.int8)
    args = one, one, torch.tensor([value]), torch.ones(1), None, None, None, dtype
    actual, expected = kernel.scaled_mm(*args), ops.scaled_mm(*args)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


@runs_here
def test_bfloat16_rounds_as_torch_does() -> None:
    """Every residual in bfloat16 and ties between neighbours, through the kernel's own conversion."""
    scales = torch.cat([torch.arange(0, 2**16, 7).to(torch.int16).view(torch.bfloat16).float(), torch.rand(999)])
    scales = torch.cat([scales, (scales.view(torch.int32) | 0x8000).view(torch.float32)])
    scales = scales[scales.isfinite()]
    one = torch.ones(len(scales), 1, dtype=torch.int8)
    y = kernel.scaled_mm(one, one[:1], scales, torch.ones(1), None, None, None, torch.bfloat16)
    assert torch.equal(y.flatten(), scales.to(torch.bfloat16))


@runs_here
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize(("left", "right"), [(127, 127), (-127, 127), (127, -128), (-127, -128), (0, -128)])
def test_extreme_values_do_not_saturate(rows: int, left: int, right: int) -> None:
    x = torch.full((rows, 4096), left, dtype=torch.int8)
    weight = torch.full((17, 4096), right, dtype=torch.int8)
    y = kernel.scaled_mm(x, weight, torch.ones(()), torch.ones(17), None, None, None, torch.float32)
    assert (y == float(4096 * left * right)).all()


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


@runs_here
@pytest.mark.parametrize("strided", ["x", "weight", "both"])
def test_strided_operands(strided: str) -> None:
    x, weight, *rest = arguments(6, 10, 32)
    if strided != "weight":
        x = torch.cat([x, x], 1)[:, :32]
    if strided != "x":
        weight = weight.T.contiguous().T
    assert_equal((x, weight, *rest))


@runs_here
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (1, 12, 70):
            assert_equal(arguments(rows, 300, 515, torch.bfloat16, bias=True))
    finally:
        torch.set_num_threads(before)


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


def kernel_constant(name: str) -> int:
    """A constant of the C++ source, written as a number or as one shifted by another."""
    source = (cpu_library.SOURCES[0].parent / "scaled_mm.cpp").read_text()
    match = re.search(rf"constexpr \w+ {name} = (\d+)(?: << (\d+))?;", source)
    assert match is not None
    return int(match[1]) << int(match[2] or 0)
