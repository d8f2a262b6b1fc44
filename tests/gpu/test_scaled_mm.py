"""The Triton kernel on the GPU that is here: the checks of the interpreter, and the tiles that products really get."""

import dataclasses
import itertools

import pytest
import torch
from kernel_checks import (
    FORMS,
    HOPPER_FORMS,
    Product,
    aligned_bound,
    aligned_error,
    check_equal,
    check_fp8,
    check_int8_sums,
    fraction_bits,
    parts_size,
    product,
)

from qcompile import products
from qcompile.lowering import scaled_mm_kernel as kernel
from qcompile.lowering.devices import device_of
from qcompile.lowering.target import detect
from qcompile.lowering.tiles import Tile, choose_tile

SHAPES = [
    (1, 1, 1), (1, 16, 15), (15, 17, 16), (17, 31, 33), (31, 15, 129), (127, 16, 33), (129, 127, 17), (1, 33, 4095),
    (4095, 17, 33), (17, 4095, 1023),
]  # fmt: skip


def here() -> dict[str, Tile]:
    """The forms that this GPU has."""
    on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return FORMS | (HOPPER_FORMS if on_hopper else {})


def has_fp8() -> bool:
    return torch.cuda.get_device_capability() >= (8, 9)


def bits() -> int:
    major, minor = torch.cuda.get_device_capability()
    return fraction_bits(10 * major + minor)


def chosen(m: int, n: int, k: int, dtype: str) -> Tile:
    target = detect(torch.device("cuda", 0))
    device = device_of(target)
    assert device is not None
    return choose_tile(m, n, k, "int8" if dtype == "int8" else "fp8", device, name=target.name)


@pytest.mark.parametrize("form", [*here(), "chosen"])
def test_int8_sums_are_exact(form: str) -> None:
    for shape in SHAPES:
        found = product(*shape, device="cuda")
        if shape[2] > 1000:
            found.weight //= 4
        check_int8_sums(found, chosen(*shape, "int8") if form == "chosen" else here()[form])


@pytest.mark.parametrize("form", [*here(), "chosen"])
@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2"])
def test_fp8_stays_within_its_bound(dtype: str, form: str) -> None:
    if not has_fp8():
        pytest.skip("this GPU has no fp8 arithmetic")
    for shape in SHAPES:
        tile = chosen(*shape, dtype) if form == "chosen" else here()[form]
        found = product(*shape, dtype, device="cuda")
        check_fp8(found, tile, aligned_bound(found, bits()))


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", here())
def test_epilogues(form: str, out_dtype: torch.dtype) -> None:
    shapes = [(19, 35, 65), (130, 272, 96)]
    for (m, n, k), activation in itertools.product(shapes, [None, *products.ACTIVATIONS]):
        found = product(m, n, k, device="cuda", per_token=m == 19)
        found.bias = torch.randn(n, device="cuda")
        found.residual = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
        found.activation, found.out_dtype = activation, out_dtype
        check_equal(found, here()[form])


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 1e30, 3e38, float("inf"), float("nan")])
@pytest.mark.parametrize("form", ["plain", "split", *(here().keys() & {"hopper"})])
def test_scales_of_any_size(scale: float, form: str) -> None:
    found = product(5, 17, 33, device="cuda")
    found.x_scale = torch.tensor([scale, 1.0, scale, 1e-3, scale], device="cuda")
    check_equal(found, here()[form])


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("m", [1, 32, 512, 2000])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336)])
def test_products_of_real_models(m: int, n: int, k: int, dtype: str) -> None:
    """With the tiles that they get; every element is written, and twice the same."""
    if dtype == "fp8" and not has_fp8():
        pytest.skip("this GPU has no fp8 arithmetic")
    found, tile = product(m, n, k, dtype, device="cuda"), chosen(m, n, k, dtype)
    first, again = found.run(tile), found.run(tile)
    assert torch.equal(first, again), "split sums are added in a fixed order"
    assert first.isfinite().all()
    assert error(found, first) < (1e-6 if dtype == "int8" else aligned_error(k, bits()) + 1e-6)


@pytest.mark.parametrize("shape", [(1, 16, 16), (17, 48, 160), (300, 256, 4096), (0, 32, 32)])
@pytest.mark.parametrize("biased", [False, True])
def test_fp8_by_cublas(shape: tuple[int, int, int], biased: bool) -> None:
    """The same numbers as ours, to the bound of its sums and one rounding of bfloat16; what it cannot take is ours."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("tiles have cuBLAS on Hopper only")
    found = product(*shape, "fp8", device="cuda")
    found.out_dtype = torch.bfloat16
    found.bias = torch.randn(shape[1], device="cuda", dtype=torch.bfloat16) if biased else None
    expected = dataclasses.replace(found, out_dtype=torch.float32).reference().double()
    tile = dataclasses.replace(FORMS["plain"], cublas=True)
    bound = aligned_bound(found, bits()) + 2**-8 * expected.abs() + 2**-16 * parts_size(found)
    assert ((found.run(tile).cpu().double() - expected).abs() <= bound).all()
    found.residual = torch.randn(shape[0], shape[1], device="cuda", dtype=torch.bfloat16)
    assert torch.equal(found.run(tile), found.run(FORMS["plain"])), "our own kernel, the residual added before rounding"


def error(found: Product, y: torch.Tensor) -> float:
    """‖y − exact‖ / ‖exact‖ of the first rows."""
    exact = found.x[:64].double() @ found.weight.double().T * found.x_scale[:64, None] * found.weight_scale
    return float((y[:64].double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336)])
def test_fp8_errs_no_more_than_cublas(n: int, k: int) -> None:
    """With fast accumulation, as ours is, and with so many tokens that nobody splits K, which lessens errors."""
    if not has_fp8():
        pytest.skip("this GPU has no fp8 arithmetic")
    found = product(2048, n, k, "fp8", device="cuda")
    found.x_scale, found.weight_scale = torch.ones_like(found.x_scale), torch.ones_like(found.weight_scale)
    one = torch.ones((), device="cuda")
    try:
        theirs = torch._scaled_mm(
            found.x, found.weight.t(), one, one, out_dtype=torch.float32, use_fast_accum=True
        )
    except RuntimeError as reason:
        pytest.skip(f"this torch has no such product here: {str(reason).splitlines()[0]}")
    tile = chosen(2048, n, k, "fp8")
    assert tile.split == 1
    assert error(found, found.run(tile)) <= 2 * error(found, theirs) + 1e-5


def test_any_strides() -> None:
    found = product(19, 35, 66, device="cuda")
    wide = torch.cat([found.x, found.x], 1)
    for changes in (
        {"x": wide[:, 66:]}, {"x": found.x.T.contiguous().T}, {"weight": found.weight.T.contiguous().T},
        {"x": found.x[:, ::2], "weight": found.weight[:, 1::2]}, {"x": found.x[:1].expand(19, 66)},
    ):  # fmt: skip
        check_int8_sums(dataclasses.replace(found, **changes), FORMS["plain"])


@pytest.mark.skipif("hopper" not in here(), reason="for Hopper")
def test_hopper_goes_to_the_other_kernel_where_rows_are_not_whole() -> None:
    """By strides, by alignment, and by alignment that only the launch knows."""
    tile = HOPPER_FORMS["hopper"]
    found = product(70, 80, 96, device="cuda")
    wide = torch.cat([found.x, found.x], 1)
    for x in (wide[:, 95:191], found.x.T.contiguous().T, wide.flatten()[1:][: 70 * 96].view(70, 96)):
        moved = dataclasses.replace(found, x=x)
        exact = moved.x.cpu().long() @ moved.weight.cpu().long().T
        operands = x, moved.weight, torch.ones(70, device="cuda"), torch.ones(80, device="cuda"), None, None
        y = kernel.scaled_mm_op(*operands, "", torch.float32, [0, *tile.to_ints()])
        assert torch.equal(y.cpu().long(), exact)


def test_no_tokens() -> None:
    assert product(0, 17, 33, device="cuda").run(FORMS["plain"]).shape == (0, 17)


def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 results: rows beyond them are right."""
    if torch.cuda.get_device_properties().total_memory < 20 * 2**30:
        pytest.skip("needs 20 GiB")
    m, n, k = 2**17 + 5, 2**14 + 128, 32
    found = product(m, n, k, device="cuda")
    last = Product(found.x[-7:], found.weight, found.x_scale[-7:], found.weight_scale, out_dtype=torch.float16)
    found.out_dtype = torch.float16
    assert torch.equal(found.run(Tile(128, 256, 32, warps=8))[-7:].cpu(), last.reference())
