"""Experts on x86: to the bit what the definition says, by either kernel, whatever the routing."""

import pytest
import torch
from kernel_checks import GroupedProduct, grouped_product
from torch import Tensor

from qcompile.grouped_ops import scaled_grouped_mm as definition
from qcompile.lowering import scaled_grouped_mm_cpu, scaled_mm_avx, scaled_mm_int8_cpu, scaled_mm_vnni, unsigned
from qcompile.lowering.target import Target, detect

HERE = detect(torch.device("cpu"))
if reason := scaled_grouped_mm_cpu.runs_on(HERE):
    pytest.skip(reason, allow_module_level=True)
ROUTINGS = [(1,), (0, 1), (16, 0, 17), (0, 0, 0, 33), (1,) * 9, (31, 0, 129, 2, 15, 0)]


def computed(found: GroupedProduct, target: Target = HERE) -> Tensor:
    operands = found.x, found.weight, found.x_scale, found.weight_scale, found.offsets
    return scaled_grouped_mm_cpu.scaled_grouped_mm(*operands, found.out_dtype, target=target)


def expected(found: GroupedProduct) -> Tensor:
    operands = found.x, found.weight, found.x_scale, found.weight_scale, found.offsets
    y: Tensor = definition(*operands, found.out_dtype)
    return y


@pytest.mark.parametrize("rows", ROUTINGS, ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["oneDNN", "own"])
@pytest.mark.parametrize("per_token", [True, False])
def test_either_kernel_is_the_definition(
    rows: tuple[int, ...], first: bool, per_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (scaled_mm_int8_cpu.runs_on(HERE) if first else not scaled_grouped_mm_cpu.product_of(HERE)):
        pytest.skip("not on this machine")
    monkeypatch.setattr(scaled_grouped_mm_cpu, "sums_first", lambda *given: first)
    found = grouped_product(rows, 24, 33, per_token=per_token)
    assert torch.equal(computed(found), expected(found))


@pytest.mark.parametrize("rows", ROUTINGS, ids=str)
@pytest.mark.parametrize("form", [scaled_mm_avx.AVX512, scaled_mm_avx.AVX2], ids=["avx512", "avx2"])
@pytest.mark.parametrize("per_token", [True, False])
def test_machines_without_vnni_get_the_definition(
    rows: tuple[int, ...], form: scaled_mm_avx.Avx, per_token: bool
) -> None:
    if reason := form.runs_on(HERE):
        pytest.skip(reason)
    target = Target("cpu", 0, frozenset({form.kernel.feature}))
    assert scaled_grouped_mm_cpu.runs_on(target) == ""
    assert scaled_grouped_mm_cpu.product_of(target) == form.operator
    found = grouped_product(rows, 24, 33, per_token=per_token)
    assert torch.equal(computed(found, target), expected(found))


@pytest.mark.parametrize("first", [True, False], ids=["oneDNN", "own"])
def test_rows_of_nobody_change_no_others(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if (scaled_mm_int8_cpu.runs_on(HERE) if first else not scaled_grouped_mm_cpu.product_of(HERE)):
        pytest.skip("not on this machine")
    monkeypatch.setattr(scaled_grouped_mm_cpu, "sums_first", lambda *given: first)
    found = grouped_product((5, 4), 24, 33)
    found.offsets -= 2
    assert torch.equal(computed(found)[:7], expected(found)[:7])


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_results_of_any_dtype(out_dtype: torch.dtype) -> None:
    found = grouped_product((5, 0, 20), 24, 64, out_dtype=out_dtype)
    y = computed(found)
    assert y.dtype == out_dtype
    step = 0 if out_dtype != torch.float64 else 2**-23
    wide = expected(found).double()
    assert ((y.double() - wide).abs() <= step * wide.abs()).all()


def test_matrices_that_lie_otherwise() -> None:
    found = grouped_product((3, 4), 24, 64)
    whole = expected(found)
    found.weight = found.weight.transpose(-2, -1).contiguous().transpose(-2, -1)
    found.offsets = found.offsets.long()
    assert torch.equal(computed(found), whole)


def test_the_operators_and_their_fakes_agree() -> None:
    found = grouped_product((3, 4), 24, 64)
    x, compensation = unsigned.shifted(found.x), unsigned.compensation(found.weight)
    scales, operator = (found.x_scale, found.weight_scale), torch.ops.qcompile_cpu.scaled_grouped_mm.default
    if not scaled_mm_vnni.runs_on(HERE):
        rest = compensation, found.offsets, torch.bfloat16, scaled_grouped_mm_cpu.UNSIGNED
        torch.library.opcheck(operator, (x, found.weight, *scales, *rest))
    if form := scaled_mm_avx.widest(HERE):
        rest = None, found.offsets, torch.bfloat16, form.operator
        torch.library.opcheck(operator, (found.x, found.weight, *scales, *rest))
    if not scaled_mm_int8_cpu.runs_on(HERE):
        torch.library.opcheck(torch.ops.qcompile_cpu.grouped_int_mm.default, (x, found.weight, found.offsets))


@pytest.mark.parametrize(("features", "rows", "first"), [
    ({"avx512_vnni"}, 4096, False), ({"avx512_vnni", "amx_int8"}, 64, False), ({"avx512_vnni", "amx_int8"}, 65, True),
    ({"avx_vnni"}, 1, True), ({"avx2", "avx_vnni"}, 1, True), ({"avx2"}, 4096, False),
])  # fmt: skip
def test_who_sums(features: set[str], rows: int, first: bool) -> None:
    """Four experts: with AMX, oneDNN from more than 16 rows each on."""
    target = Target("cpu", 0, frozenset(features))
    needed = {"avx512_vnni": scaled_mm_vnni, "avx2": scaled_mm_avx.AVX2, "amx_int8": scaled_mm_int8_cpu}
    if any(kernel.runs_on(target) for feature, kernel in needed.items() if feature in features):
        pytest.skip("not on this machine")
    x, weight = torch.empty(rows, 16, dtype=torch.int8), torch.empty(4, 8, 16, dtype=torch.int8)
    assert scaled_grouped_mm_cpu.sums_first(target, x, weight) == first


def test_what_is_refused() -> None:
    int8 = torch.empty(4, 16, dtype=torch.int8)
    assert "VNNI" in scaled_grouped_mm_cpu.runs_on(Target("cpu"))
    assert scaled_grouped_mm_cpu.takes(HERE, int8, int8) == ""
    assert "needs int8" in scaled_grouped_mm_cpu.takes(HERE, int8.to(torch.float8_e4m3fn), int8)
    longest = unsigned.LARGEST_K if "avx512_vnni" in HERE.features else scaled_mm_avx.LARGEST_K
    long = torch.empty(1, longest + 1, dtype=torch.int8, device="meta")
    assert "int32" in scaled_grouped_mm_cpu.takes(HERE, long, long)
