"""The kernel for x86 without VNNI, in both widths, equals the definition bit for bit."""

from typing import Any

import pytest
import torch
from cpu_product_checks import HERE, ProductChecks, operands

from qcompile.lowering.scaled_mm_avx import AVX2, AVX512, LARGEST_K, Avx, takes, widest
from qcompile.lowering.target import Target


class AvxChecks(ProductChecks):
    many = 300

    @pytest.mark.parametrize(("changed", "reason"), [
        ({"x": torch.zeros(5, 16, dtype=torch.uint8)}, "needs x contiguous, of its dtype"),
        ({"out_dtype": torch.int32}, "for sums none"), ({"x_scale": None}, "both scales"),
        ({"weight_scale": None}, "both scales"),
    ], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")  # fmt: skip
    def test_sums_have_no_scales_and_all_else_has_both(self, changed: dict[str, Any], reason: str) -> None:
        with pytest.raises(RuntimeError, match=reason):
            self.raw(**changed)

    def test_the_fake_of_sums(self) -> None:
        nothing = dict.fromkeys(("x_scale", "weight_scale", "bias", "residual"))
        operator = getattr(torch.ops.qcompile_cpu, self.operator).default
        torch.library.opcheck(operator, self.raw_operands(**nothing, out_dtype=torch.int32))


class TestAvx512(AvxChecks):
    kernel = AVX512
    operator = "scaled_mm_avx512"


class TestAvx2(AvxChecks):
    kernel = AVX2
    operator = "scaled_mm_avx2"


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
