"""The kernel for x86 without VNNI, in both widths, equals the definition bit for bit."""

from typing import Any

import pytest
import torch
from cpu_product_checks import HERE, ProductChecks, operands

from qcompile.lowering.scaled_mm_avx import AVX2, AVX512, LARGEST_K, Avx, takes, widest
from qcompile.lowering.target import Target


class TestAvx512(ProductChecks):
    kernel = AVX512
    many = 300


class TestAvx2(ProductChecks):
    kernel = AVX2
    many = 300


@pytest.fixture(params=[AVX512, AVX2], ids=["avx512", "avx2"])
def form(request: pytest.FixtureRequest) -> Avx:
    found: Avx = request.param
    if reason := found.runs_on(HERE):
        pytest.skip(reason)
    return found


@pytest.mark.parametrize("rows", [0, 1, 7, 12, 13, 40, 100])
@pytest.mark.parametrize(("columns", "channels"), [(1, 1), (13, 70), (65, 2100)])
def test_sums_are_exact(form: Avx, rows: int, columns: int, channels: int) -> None:
    x, weight = operands(rows, columns, channels)
    sums = form.accumulate(x, weight.T.contiguous().T)
    assert sums.dtype == torch.int32
    assert torch.equal(sums, (x.long() @ weight.long().T).int())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rows", [1, 20])
def test_the_longest_sums_stay_within_int32(form: Avx, rows: int, sign: int) -> None:
    x = torch.full((rows, LARGEST_K), -128, dtype=torch.int8)
    weight = torch.full((3, LARGEST_K), 127 if sign < 0 else -128, dtype=torch.int8)
    assert (form.accumulate(x, weight) == LARGEST_K * 128 * (127 * sign if sign < 0 else 128)).all()
    assert LARGEST_K * 128**2 < 2**31 <= (LARGEST_K + 1) * 128**2


def raw(form: Avx, **changed: Any) -> torch.Tensor:
    """The operator itself."""
    x, weight = operands(5, 7, 16)
    named = {
        "x": x, "weight": weight, "x_scale": torch.rand(5), "weight_scale": torch.rand(7), "bias": torch.rand(7),
        "residual": torch.rand(5, 7), "dtype": torch.float32,
    }  # fmt: skip
    y: torch.Tensor = getattr(torch.ops.qcompile_cpu, form.operator).default(*(named | changed).values())
    return y


@pytest.mark.parametrize("rows", [1, 20])
def test_no_channels_are_a_sum_of_nothing(form: Avx, rows: int) -> None:
    x, weight = torch.zeros(rows, 0, dtype=torch.int8), torch.zeros(5, 0, dtype=torch.int8)
    bias = torch.randn(5)
    y = raw(form, x=x, weight=weight, x_scale=torch.ones(rows), weight_scale=torch.ones(5), bias=bias, residual=None)
    assert torch.equal(y, bias.expand(rows, 5))


def test_the_operator_has_a_schema_and_a_fake(form: Avx) -> None:
    operator = getattr(torch.ops.qcompile_cpu, form.operator).default
    x, weight = operands(5, 7, 16)
    torch.library.opcheck(operator, (x, weight, torch.rand(5), torch.rand(7), torch.rand(7), None, torch.float16))
    torch.library.opcheck(operator, (x, weight, None, None, None, None, torch.int32))


@pytest.mark.parametrize(("changed", "named"), [
    ({"x": torch.zeros(5, 16, dtype=torch.uint8)}, "x"),
    ({"x": torch.zeros(5, 15, dtype=torch.int8)}, "weight \\[N, K\\]"),
    ({"weight": torch.zeros(16, 7, dtype=torch.int8).T}, "weight"),
    ({"x_scale": torch.rand(4)}, "x_scale"),
    ({"weight_scale": torch.rand(8)}, "weight_scale"),
    ({"bias": torch.rand(7).double()}, "bias"),
    ({"residual": torch.rand(5, 7).half()}, "residual"),
    ({"dtype": torch.float64}, "float32, bfloat16 or float16"),
    ({"dtype": torch.int32}, "for sums none"),
    ({"x_scale": None}, "both scales"),
    ({"weight_scale": None}, "both scales"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")  # fmt: skip
def test_the_operator_refuses_memory_that_it_would_misread(form: Avx, changed: dict[str, Any], named: str) -> None:
    with pytest.raises(RuntimeError, match=named):
        raw(form, **changed)


def test_what_is_taken() -> None:
    int8 = torch.empty(4, 16, dtype=torch.int8)
    assert takes(HERE, int8, int8) == ""
    assert "needs int8" in takes(HERE, int8.to(torch.float8_e4m3fn), int8)
    assert takes(HERE, int8, torch.empty(1, LARGEST_K, dtype=torch.int8, device="meta")) == ""
    assert "int32" in takes(HERE, int8, torch.empty(1, LARGEST_K + 1, dtype=torch.int8, device="meta"))


def test_a_target_gets_its_widest_form(form: Avx) -> None:
    features = {form.kernel.feature, "avx2"}
    assert widest(Target("cpu", 0, frozenset(features))) is form
    assert widest(Target("cpu")) is None
    assert widest(Target("cuda", 90, frozenset(features))) is None
