"""What every int8 product of ours on CPUs has to do: equal the definition bit for bit, in each of its forms and at
their edges. A test class for a kernel inherits these tests and names the kernel."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile import ops
from qcompile.lowering.target import detect

HERE = detect(torch.device("cpu"))


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


class ProductChecks:
    """kernel: has scaled_mm and runs_on. operator: of qcompile_cpu. many: more tokens than stay in the cache, of 2048
    channels."""

    kernel: Any
    operator: str
    many: int

    @staticmethod
    def as_read(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """x int8 as the operator reads it, and what else it needs to know of the weight."""
        return {"x": x}

    def raw(self, rows: int = 5, channels: int = 16, **changed: Any) -> Tensor:
        """The operator itself, of 7 weight rows."""
        operator = getattr(torch.ops.qcompile_cpu, self.operator).default
        y: Tensor = operator(*self.raw_operands(rows, channels, **changed))
        return y

    def raw_operands(self, rows: int = 5, channels: int = 16, **changed: Any) -> tuple[Any, ...]:
        x, weight = operands(rows, 7, channels)
        read = self.as_read(x, weight)
        named = {
            "x": read.pop("x"), "weight": weight, "x_scale": torch.rand(rows), "weight_scale": torch.rand(7), **read,
            "bias": torch.rand(7), "residual": torch.rand(rows, 7), "out_dtype": torch.float32,
        }  # fmt: skip
        return tuple((named | changed).values())

    @pytest.fixture(autouse=True)
    def _runs_here(self) -> None:
        if reason := self.kernel.runs_on(HERE):
            pytest.skip(reason)

    def assert_equal(self, args: tuple[Any, ...]) -> None:
        actual, expected = self.kernel.scaled_mm(*args), ops.scaled_mm(*args)
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected), f"{int((actual != expected).sum())} of {expected.numel()} differ"

    @pytest.mark.parametrize("rows", [0, *range(1, 35), 47, 48, 49, 63, 64, 65, 95, 96, 97, 100, 130])
    @pytest.mark.parametrize(("columns", "channels"), [(1, 1), (13, 7), (16, 64), (37, 130), (50, 257), (12, 3)])
    def test_every_number_of_tokens(self, rows: int, columns: int, channels: int) -> None:
        options = {"per_token": rows % 3 > 0, "bias": rows % 2 > 0, "residual": rows % 5 > 1}
        self.assert_equal(arguments(rows, columns, channels, **options))

    @pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 11, 13, 16, 33])
    @pytest.mark.parametrize("channels", [2047, 2048, 2049, 2816, 4095, 4096, 8192, 11008])
    def test_rows_that_alias_in_the_cache_and_tokens_that_do_not_fit_it(self, rows: int, channels: int) -> None:
        self.assert_equal(arguments(rows, 29, channels, bias=True))

    def test_more_tokens_than_fit_the_second_level_cache(self) -> None:
        self.assert_equal(arguments(self.many, 26, 2048))

    @pytest.mark.parametrize("columns", [64, 65, 135])
    def test_more_weight_rows_than_are_taken_at_once(self, columns: int) -> None:
        self.assert_equal(arguments(20, columns, 2100, torch.bfloat16, bias=True, residual=True))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("options", [
        {}, {"bias": True}, {"residual": True}, {"bias": True, "residual": True}, {"activation": "relu"},
        {"bias": True, "residual": True, "activation": "gelu_tanh"}, {"per_token": False},
    ], ids=str)  # fmt: skip
    @pytest.mark.parametrize("rows", [1, 5, 20])
    def test_every_epilogue_and_dtype(self, rows: int, options: dict[str, Any], dtype: torch.dtype) -> None:
        self.assert_equal(arguments(rows, 21, 70, dtype, **options))

    @pytest.mark.parametrize("leading", [(2, 3), (1, 1, 4), ()], ids=str)
    def test_leading_dimensions(self, leading: tuple[int, ...]) -> None:
        count = torch.Size(leading).numel()
        x, weight, x_scale, *rest = arguments(count, 9, 33, bias=True, residual=True)
        rest[2] = rest[2].reshape(*leading, 9)
        self.assert_equal((x.reshape(*leading, 33), weight, x_scale.reshape(leading), *rest))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-40, 65519.9, 1e39, -0.0])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_numbers_at_the_edge_of_a_dtype(self, value: float, dtype: torch.dtype) -> None:
        """One product of 1 × 1 with that scale: the rounding is torch's, subnormal numbers and NaN included."""
        one = torch.ones(1, 1, dtype=torch.int8)
        args = one, one, torch.tensor([value]), torch.ones(1), None, None, None, dtype
        actual, expected = self.kernel.scaled_mm(*args), ops.scaled_mm(*args)
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.nan_to_num(), expected.nan_to_num())

    def test_bfloat16_rounds_as_torch_does(self) -> None:
        """Every residual in bfloat16 and ties between neighbours, through the kernel's own conversion."""
        scales = torch.cat([torch.arange(0, 2**16, 7).to(torch.int16).view(torch.bfloat16).float(), torch.rand(999)])
        scales = torch.cat([scales, (scales.view(torch.int32) | 0x8000).view(torch.float32)])
        scales = scales[scales.isfinite()]
        one = torch.ones(len(scales), 1, dtype=torch.int8)
        y = self.kernel.scaled_mm(one, one[:1], scales, torch.ones(1), None, None, None, torch.bfloat16)
        assert torch.equal(y.flatten(), scales.to(torch.bfloat16))

    @pytest.mark.parametrize("rows", [1, 7, 40])
    @pytest.mark.parametrize(("left", "right"), [(127, 127), (-127, 127), (127, -128), (-127, -128), (0, -128)])
    def test_extreme_values_do_not_saturate(self, rows: int, left: int, right: int) -> None:
        x = torch.full((rows, 4096), left, dtype=torch.int8)
        weight = torch.full((17, 4096), right, dtype=torch.int8)
        y = self.kernel.scaled_mm(x, weight, torch.ones(()), torch.ones(17), None, None, None, torch.float32)
        assert (y == float(4096 * left * right)).all()

    def test_a_bias_that_is_strided(self) -> None:
        x, weight, x_scale, weight_scale, _, *rest = arguments(6, 10, 32)
        for bias in (torch.randn(10, 2)[:, 0], torch.randn(1).expand(10)):
            self.assert_equal((x, weight, x_scale, weight_scale, bias, *rest))

    @pytest.mark.parametrize("strided", ["x", "weight", "both"])
    def test_strided_operands(self, strided: str) -> None:
        x, weight, *rest = arguments(6, 10, 32)
        if strided != "weight":
            x = torch.cat([x, x], 1)[:, :32]
        if strided != "x":
            weight = weight.T.contiguous().T
        self.assert_equal((x, weight, *rest))

    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_any_number_of_threads_gives_the_same(self, threads: int) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for rows in (1, 12, 70):
                self.assert_equal(arguments(rows, 300, 515, torch.bfloat16, bias=True))
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize("rows", [1, 20])
    def test_no_channels_are_a_sum_of_nothing(self, rows: int) -> None:
        bias = torch.randn(7)
        assert torch.equal(self.raw(rows, 0, bias=bias, residual=None), bias.expand(rows, 7))

    @pytest.mark.parametrize("absent", [{}, {"bias": None, "residual": None}], ids=len)
    def test_the_operator_has_a_schema_and_a_fake(self, absent: dict[str, Any]) -> None:
        operator = getattr(torch.ops.qcompile_cpu, self.operator).default
        torch.library.opcheck(operator, self.raw_operands(**absent))

    @pytest.mark.parametrize(("changed", "reason"), [
        ({"x": torch.zeros(5, 16)}, "x"),
        ({"x": torch.zeros(5, 15, dtype=torch.int8)}, "weight \\[N, K\\]"),
        ({"weight": torch.zeros(16, 7, dtype=torch.int8).T}, "weight"),
        ({"x_scale": torch.rand(4)}, "x_scale"),
        ({"weight_scale": torch.rand(8)}, "weight_scale"),
        ({"bias": torch.rand(7).double()}, "bias"),
        ({"residual": torch.rand(5, 7).half()}, "residual"),
        ({"out_dtype": torch.float64}, "float32, bfloat16 or float16"),
    ], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")  # fmt: skip
    def test_the_operator_refuses_memory_that_it_would_misread(self, changed: dict[str, Any], reason: str) -> None:
        with pytest.raises(RuntimeError, match=f"qcompile_cpu.* {reason}"):
            self.raw(**changed)
