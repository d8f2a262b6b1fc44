"""The Triton kernel's numbers, in Triton's interpreter."""

import dataclasses
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by tests/lowering/test_scaled_mm_kernel.py", allow_module_level=True)

from kernel_checks import DTYPES, FORMS, SMALL, apart, check_equal, check_fp8, check_int8_sums, product

from qcompile import products
from qcompile.lowering import scaled_mm_kernel as kernel
from qcompile.lowering.tiles import Tile

# NumPy's, which Triton interprets with; the last is Triton 3.6's doing.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered", "ignore:invalid value encountered", "ignore:Conversion of an array with ndim"
)
LARGE = Tile(128, 128, 128, warps=8, stages=2)
# 4095 once in every place; the others in a covering selection.
SHAPES = [
    (1, 1, 1), (1, 16, 15), (15, 17, 16), (16, 1, 17), (17, 31, 33), (31, 15, 129), (33, 33, 31), (127, 16, 33),
    (129, 127, 17), (16, 129, 127), (1, 33, 4095), (31, 17, 4095),
]  # fmt: skip
LONG = [(4095, 17, 33), (3, 4095, 31), (1, 1, 4095)]
EXAMPLES = int(os.environ.get("QCOMPILE_KERNEL_EXAMPLES", "20"))


@pytest.mark.parametrize(
    ("shape", "form"), [(shape, form) for i, shape in enumerate(SHAPES) for form in (list(FORMS) * 2)[i % 6 :][:3]]
)
def test_int8_sums_are_exact(shape: tuple[int, int, int], form: str) -> None:
    tile = FORMS[form]
    m, n, k = shape
    found = product(m, n, k)
    if k > 1024:  # so that float32 holds the sums
        found.weight //= 4
    check_int8_sums(found, tile)


@pytest.mark.parametrize("shape", LONG, ids=str)
@pytest.mark.parametrize("swap", [False, True])
def test_long_sides(shape: tuple[int, int, int], swap: bool) -> None:
    found = product(*shape)
    found.weight //= 4
    check_int8_sums(found, dataclasses.replace(LARGE, swap=swap))


@pytest.mark.parametrize("split", [1, 4])
def test_the_largest_sums_are_exact(split: int) -> None:
    """Beyond what float32 holds: the partial sums themselves are int32."""
    from qcompile.lowering.scaled_mm_triton import LARGEST_K

    k = LARGEST_K
    x, weight = torch.full((1, k), -128, dtype=torch.int8), torch.full((2, k), -128, dtype=torch.int8)
    found = dataclasses.replace(product(1, 2, 1), x=x, weight=weight, x_scale=torch.ones(1), weight_scale=torch.ones(2))
    y = found.run(Tile(16, 16, 4096, split=split))
    assert torch.equal(y, torch.full((1, 2), float(k * 128**2)))
    assert k * 128**2 < 2**31 <= (k + 1) * 128**2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2"])
def test_fp8_stays_within_its_bound(dtype: str, form: str) -> None:
    for shape in [(1, 17, 129), (33, 31, 65), (17, 129, 127)]:
        check_fp8(product(*shape, dtype), FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", [None, *products.ACTIVATIONS])
@pytest.mark.parametrize("per_token", [True, False])
def test_epilogues(form: str, activation: str | None, per_token: bool) -> None:
    found = product(19, 35, 65, per_token=per_token)
    for bias, residual in [(True, False), (False, True), (True, True)][0 if activation is None else 2 :]:
        check_equal(
            dataclasses.replace(
                found,
                bias=torch.randn(35) if bias else None,
                residual=torch.randn(19, 35) if residual else None,
                activation=activation,
            ),
            FORMS[form],
        )


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_bias_and_residual_need_not_be_the_results(out_dtype: torch.dtype, other: torch.dtype) -> None:
    found = product(17, 33, 40)
    found.bias, found.residual = torch.randn(33).to(other), torch.randn(17, 33).to(other)
    found.out_dtype = out_dtype
    check_equal(found, SMALL)


def test_bfloat16_results() -> None:
    """The interpreter rounds to bfloat16 wrongly where the fraction carries into the exponent: so numbers that need no
    rounding. (Rounding itself is the GPU's; tests/gpu checks it.)"""
    found = product(17, 33, 40)
    found.x = found.x.sign()
    found.weight = found.weight.sign()
    found.x_scale, found.weight_scale, found.out_dtype = torch.ones(17), torch.full((33,), 0.5), torch.bfloat16
    assert torch.equal(found.run(SMALL), found.reference())


def test_overflow_of_float16_is_infinite() -> None:
    found = product(3, 5, 64)
    found.x_scale, found.out_dtype = torch.full((3,), 1e6), torch.float16
    y = found.run(SMALL)
    assert torch.equal(y, found.reference())
    assert y.isinf().any()


@pytest.mark.parametrize("form", ["plain", "swap", "split"])
def test_any_strides(form: str) -> None:
    found = product(19, 35, 66)
    wide = torch.cat([found.x, found.x], 1)
    check_int8_sums(dataclasses.replace(found, x=wide[:, 66:]), FORMS[form])
    check_int8_sums(dataclasses.replace(found, x=found.x[:, ::2], weight=found.weight[:, 1::2]), FORMS[form])
    check_int8_sums(dataclasses.replace(found, x=found.x.T.contiguous().T), FORMS[form])
    check_int8_sums(dataclasses.replace(found, weight=found.weight.T.contiguous().T), FORMS[form])
    check_int8_sums(dataclasses.replace(found, x=found.x[:1].expand(19, 66)), FORMS[form])
    residual = torch.randn(35, 40).T[:19]
    check_equal(dataclasses.replace(found, residual=residual), FORMS[form])
    vectors = {"x_scale": torch.rand(38)[::2], "weight_scale": torch.rand(70)[1::2], "bias": torch.randn(1).expand(35)}
    check_equal(dataclasses.replace(found, **vectors), FORMS[form])


@pytest.mark.parametrize("form", ["tma", "tma split swap"])
def test_rows_that_tma_cannot_read_go_through_pointers(form: str) -> None:
    """Beginning anywhere, between multiples of 16 bytes, or not one after the other."""
    found, tiles = product(19, 35, 66), [0, *FORMS[form].to_ints()]
    exact = (found.x.long() @ found.weight.long().T).float()
    x, weight = apart(found.x), apart(found.weight)
    offset = torch.frombuffer(bytearray(19 * 80 + 1), dtype=torch.int8, offset=1).view(19, 80)[:, :66]
    offset.copy_(found.x)
    shifted = torch.cat([x.new_zeros(19, 8), found.x, x.new_zeros(19, 6)], 1)[:, 8:74]
    assert not any(map(kernel.can_use_tma, (found.x, shifted, offset, x[:1].expand(19, 66), x.T)))
    transposed = found.weight.T.contiguous().T
    for operands in ((found.x, weight), (offset, weight), (shifted, weight), (x, transposed), (x, weight)):
        scales = torch.ones(19), torch.ones(35)
        assert torch.equal(kernel.scaled_mm_op(*operands, *scales, None, None, "", torch.float32, tiles), exact)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form: str) -> None:
    found = product(0, 17, 33)
    found.out_dtype = torch.float16
    y = found.run(FORMS[form])
    assert y.shape == (0, 17)
    assert y.dtype == torch.float16


@pytest.mark.parametrize("form", ["plain", "swap", "split", "halves"])
def test_other_groups_visit_every_tile(form: str) -> None:
    for group in (1, 3, 16):
        check_int8_sums(product(129, 47, 33), dataclasses.replace(FORMS[form], group=group))


def test_bits_beyond_the_end_of_k_are_never_read() -> None:
    """Whatever lies behind a row in memory has no influence, not even NaN. (The interpreter knows e5m2's only.)"""
    found = product(17, 33, 40, "fp8_e5m2")
    for operand in ("x", "weight"):
        values = getattr(found, operand)
        wide = torch.full((len(values), 64), float("nan")).to(torch.float8_e5m2)
        wide[:, :40] = values
        dirty = dataclasses.replace(found, **{operand: wide[:, :40]})
        for form in ("plain", "swap", "split"):
            assert torch.equal(found.run(FORMS[form]), dirty.run(FORMS[form]))


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 1e30, 3e38, float("inf"), float("nan")])
@pytest.mark.parametrize("form", ["plain", "split"])
def test_scales_of_any_size(scale: float, form: str) -> None:
    found = product(5, 17, 33)
    found.x_scale = torch.tensor([scale, 1.0, scale, 1e-3, scale])
    check_equal(found, FORMS[form])
    found.bias = torch.randn(17)
    check_equal(found, FORMS[form])


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 40)
@given(
    shape=st.tuples(*[st.sampled_from([1, 2, 15, 16, 17, 31, 33, 48, 65])] * 3),
    dtype=st.sampled_from(list(DTYPES)),
    form=st.sampled_from([form for form in FORMS if form != "halves"]),
    scales=st.lists(st.sampled_from([0.0, 1e-45, 1e-39, 1e-3, 1.0, 1e20, 3e38]), min_size=1, max_size=4),
    activation=st.sampled_from([None, *products.ACTIVATIONS]),
    out_dtype=st.sampled_from([torch.float16, torch.float32]),
    extras=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**16),
)
def test_any_product(
    shape: tuple[int, int, int],
    dtype: str,
    form: str,
    scales: list[float],
    activation: str | None,
    out_dtype: torch.dtype,
    extras: tuple[bool, bool, bool],
    seed: int,
) -> None:
    m, n, k = shape
    per_token, has_bias, has_residual = extras
    found = product(m, n, k, dtype, per_token=per_token, seed=seed)
    repeated = torch.tensor((scales * m)[:m])
    found.x_scale = repeated if per_token else repeated[0]
    found.weight_scale = torch.tensor((scales[::-1] * n)[:n])
    if has_bias:
        found.bias = torch.randn(n)
    if has_residual:
        found.residual = torch.randn(m, n)
    found.activation, found.out_dtype = activation, out_dtype
    check_equal(found, FORMS[form])


def test_dynamo_traces_the_operator() -> None:
    found = product(5, 17, 65)
    operands = found.x, found.weight, found.x_scale, found.weight_scale, None, None, "", torch.bfloat16
    compiled = torch.compile(kernel.scaled_mm_op, backend="eager", fullgraph=True, dynamic=False)
    for form in ("plain", "split"):
        y = compiled(*operands, [0, *FORMS[form].to_ints()])
        found.out_dtype = torch.bfloat16
        assert torch.equal(y, found.run(FORMS[form]))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_timed_is_the_product(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `qcompile tune` and the benchmark launch it, with the kernel that finishes a split one."""
    from qcompile.bench import gpu_timing

    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    gpu_timing.finishing.cache_clear()
    found = product(19, 35, 65)
    x, weight = (apart(t) for t in (found.x, found.weight))
    y = gpu_timing.product(FORMS[form])((x, weight, found.x_scale, found.weight_scale))
    gpu_timing.finishing.cache_clear()
    found.out_dtype = torch.bfloat16
    assert torch.equal(y, found.run(FORMS[form]))


def test_a_whole_model_with_the_kernel_in_it() -> None:
    """Lowered for a GPU, run here: static and symbolic numbers of tokens."""
    from graphs import GatedMLP, captured, outputs

    import qcompile.passes as passes
    from qcompile.config import Config
    from qcompile.lowering.inductor import decompositions
    from qcompile.lowering.lower import lower
    from qcompile.lowering.target import Target

    for dynamic in (False, True):
        capture = captured(GatedMLP(32, 48), torch.randn(2, 5, 32), dynamic=dynamic)
        quantized, _ = passes.quantizing(Config()).run(capture.graph)
        lowered, chosen = lower(quantized, Target("cuda", 90), decompositions())
        assert set(chosen.values()) == {"triton"}
        for expected, actual in zip(outputs(quantized, capture), outputs(lowered, capture), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
