"""Which implementation a target gets, why others were passed over, and which dtypes are refused."""

import sys

import pytest
import torch

from qcompile import grouped_ops, ops
from qcompile.errors import LoweringError
from qcompile.lowering import cpu_library, scaled_mm_avx, scaled_mm_int8_cpu, scaled_mm_triton, select
from qcompile.lowering.grouped_linear import grouped_linear
from qcompile.lowering.target import Target
from qcompile.lowering.unsigned import LARGEST_K

VNNI = Target("cpu", 0, frozenset({"avx512_vnni"}))
AMX = Target("cpu", 0, frozenset({"avx512_vnni", "amx_int8"}))
AVX2 = Target("cpu", 0, frozenset({"avx2"}))
AVX512 = Target("cpu", 0, frozenset({"avx2", "avx512"}))
INT8 = torch.empty(4, 16, dtype=torch.int8)
FP8 = torch.empty(4, 16, dtype=torch.float8_e4m3fn)


@pytest.fixture(autouse=True)
def everything_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a C++ compiler and a newer version than torch 2.11, whatever is here."""
    monkeypatch.setattr(scaled_mm_int8_cpu, "_multiplies_unsigned", lambda: True)
    monkeypatch.setattr(cpu_library.Kernel, "not_built", lambda self: "")


@pytest.mark.parametrize(
    ("target", "x", "weight", "name", "refusal"),
    [
        (VNNI, INT8, INT8, "vnni", ""),
        (Target("cpu", 0, frozenset({"avx_vnni"})), INT8, INT8, "int8_cpu", "vnni: needs a CPU with AVX512-VNNI"),
        (Target("cpu", 0, frozenset({"amx_int8"})), INT8, INT8, "int8_cpu", "vnni: needs a CPU with AVX512-VNNI"),
        (AMX, INT8, INT8, "vnni", ""),
        (VNNI, INT8, torch.empty(2, LARGEST_K, dtype=torch.int8), "vnni", ""),
        (VNNI, INT8, torch.empty(2, LARGEST_K + 1, dtype=torch.int8), "int8_float", "int32"),
        (VNNI, INT8, torch.empty(2, 1, dtype=torch.int8), "vnni", ""),
        (AMX, torch.empty(100, 16, dtype=torch.int8), INT8, "int8_cpu", "vnni: is for at most 16 tokens"),
        (AMX, torch.empty(100, 1, dtype=torch.int8), torch.empty(2, 1, dtype=torch.int8), "vnni", ""),
        (Target("cpu", 0, frozenset({"avx_vnni"})), INT8, torch.empty(2, 1, dtype=torch.int8), "int8_float", "K of at"),
        (AVX512, INT8, INT8, "avx512", "int8_cpu: needs VNNI or AMX"),
        (AVX2, INT8, INT8, "avx2", "avx512: needs a CPU with AVX512"),
        (AVX2, INT8, torch.empty(2, scaled_mm_avx.LARGEST_K + 1, dtype=torch.int8), "int8_float", "avx2: needs K ≤"),
        (AVX2, FP8, FP8, "reference", "avx2: needs int8"),
        (Target("cpu"), INT8, INT8, "int8_float", "avx2: needs a CPU with AVX2"),
        (Target("mps"), INT8, INT8, "int8_float", ""),
        (VNNI, FP8, FP8, "reference", "needs int8"),
        (Target("cuda", 90), INT8, INT8, "triton", ""),
        (Target("cuda", 89), FP8, FP8, "triton", ""),
        (Target("cuda", 90), INT8, torch.empty(2, 2**18, dtype=torch.int8), "int8_float", "triton: needs K ≤ 131071"),
        (Target("cuda", 90), INT8, torch.empty(8, 2**18, dtype=torch.int8), "int_mm", "triton: needs K ≤ 131071"),
        (Target("cuda", 80), FP8, FP8, "reference", "triton: fp8 needs compute capability 8.9"),
        (Target("cuda", 75), INT8, torch.empty(8, 16, dtype=torch.int8), "int_mm", "triton: needs an NVIDIA GPU"),
        (Target("cuda", 75), INT8, torch.empty(9, 16, dtype=torch.int8), "int8_float", "int_mm: needs K and N"),
        (Target("cuda", 70), INT8, torch.empty(8, 16, dtype=torch.int8), "int8_float", "int_mm: needs an NVIDIA GPU"),
        (Target("hip", name="MI300X"), INT8, INT8, "int8_float", ""),
    ],
)
def test_the_first_that_can_is_chosen(
    target: Target, x: torch.Tensor, weight: torch.Tensor, name: str, refusal: str
) -> None:
    implementation, refusals = select.select_scaled_mm(target, x, weight)
    assert implementation.name == name
    assert any(refusal in reason for reason in refusals) if refusal else not refusals


@pytest.mark.parametrize("can", [True, False])
def test_many_tokens_are_our_own_kernels_where_onednn_has_no_amx(can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled_mm_int8_cpu, "_multiplies_unsigned", lambda: can)
    x = torch.empty(100, 16, dtype=torch.int8)
    assert select.select_scaled_mm(AMX, x, INT8)[0].name == ("int8_cpu" if can else "vnni")


@pytest.mark.parametrize(
    ("target", "x", "name"),
    [
        (VNNI, INT8, "int8_cpu"),
        (AVX512, INT8, "avx512"),
        (AVX2, INT8, "avx2"),
        (Target("cpu"), INT8, "int8_float"),
        (VNNI, FP8, "reference"),
        (Target("cuda", 90), torch.empty(8, 16, dtype=torch.int8), "int_mm"),
        (Target("cuda", 70), INT8, "int8_float"),
        (Target("cuda", 90), FP8, "reference"),
    ],
)
def test_sums_come_from_the_first_that_gives_them_away(target: Target, x: torch.Tensor, name: str) -> None:
    implementation, refusals = select.select_accumulate(target, x, x)
    assert implementation.name == name
    assert implementation.accumulate is not None
    assert not any(reason.startswith(("vnni:", "triton:")) for reason in refusals)


def test_no_implementation_is_an_error_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [one for one in select.SCALED_MM if one.name in ("vnni", "triton", "int_mm")]
    monkeypatch.setattr(select, "SCALED_MM", tuple(some))
    with pytest.raises(LoweringError, match=r"cuda \(sm70\): triton: needs .*; int_mm: needs "):
        select.select_scaled_mm(Target("cuda", 70), INT8, INT8)
    with pytest.raises(LoweringError, match=r"hip \(MI300X\): there is none"):
        select.select_scaled_mm(Target("hip", name="MI300X"), INT8, INT8)


def test_without_triton_a_gpu_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    scaled_mm_triton.not_installed.cache_clear()
    try:
        found, refusals = select.select_scaled_mm(Target("cuda", 90), INT8, torch.empty(8, 16, dtype=torch.int8))
    finally:
        scaled_mm_triton.not_installed.cache_clear()
    assert found.name == "int_mm"
    assert refusals[0].startswith("triton: needs Triton, which cannot be imported")


@pytest.mark.parametrize("capability", [70, 80, 86])
def test_fp8_is_refused_where_there_is_no_arithmetic_for_it(capability: int) -> None:
    with pytest.raises(LoweringError, match=r"8\.9.*int8"):
        select.check_dtype(Target("cuda", capability), torch.float8_e4m3fn)


def test_fp8_on_cpu_warns_that_it_is_for_checking_numbers() -> None:
    with pytest.warns(UserWarning, match="checking numbers"):
        select.check_dtype(Target("cpu"), torch.float8_e5m2)


@pytest.mark.parametrize(
    ("target", "dtype"),
    [(Target("cuda", 89), torch.float8_e4m3fn), (Target("cuda", 70), torch.int8), (VNNI, torch.int8)],
)
def test_supported_dtypes_pass_in_silence(target: Target, dtype: torch.dtype) -> None:
    select.check_dtype(target, dtype)


def test_everything_but_products_is_inlined() -> None:
    """What runs on every call has implementations, as products and attention, or is plain ATen for Inductor to fuse."""
    products = {ops.scaled_mm, ops.accumulate, ops.attention, grouped_ops.scaled_grouped_mm}
    products.add(grouped_ops.grouped_linear)
    every_call = {ops.observe, ops.rescale, ops.quantize, ops.quantize_static, ops.from_sums} | products
    assert set(select.INLINED) | products == every_call
    assert select.INLINED[grouped_ops.grouped_linear] is grouped_linear
    smoothing = {ops.smoothing_scale, ops.search_smoothing_scale, ops.power_of_two}
    weights_alone = smoothing | {ops.static_scale, ops.clipped_static_scale, ops.concatenate}
    assert set(ops.REFERENCES) - every_call == weights_alone


def test_implementations_have_names_of_their_own_and_the_reference_is_last() -> None:
    names = [implementation.name for implementation in select.SCALED_MM]
    assert len(set(names)) == len(names)
    assert names[-1] == "reference"


@pytest.mark.parametrize("special", [0.0, -0.0, 1e-45, -1e-38, 3e38, torch.inf, -torch.inf, torch.nan, -torch.nan])
def test_the_largest_magnitude_by_bits(special: float) -> None:
    x = torch.randn(3, 50)
    x[1] = special
    x[2, 17] = special
    assert torch.equal(select.absmax_by_bits(x).nan_to_num(-1.0), ops.row_absmax(x).nan_to_num(-1.0))


def test_gpus_find_it_by_bits() -> None:
    found = {kind: select.inlined(Target(kind), ops.quantize) for kind in ("cpu", "cuda", "mps")}  # type: ignore[arg-type]
    x = torch.randn(3, 50)
    expected = ops.quantize(x, [], "row", torch.int8)
    for function in found.values():
        assert all(map(torch.equal, function(x, [], "row", torch.int8), expected))
    assert found["cpu"] is found["mps"] is ops.REFERENCES[ops.quantize]
    assert found["cuda"].keywords == {"row_absmax": select.absmax_by_bits}  # type: ignore[attr-defined]
    assert select.inlined(Target("cuda"), torch.ops.aten.add.Tensor) is torch.ops.aten.add.Tensor
