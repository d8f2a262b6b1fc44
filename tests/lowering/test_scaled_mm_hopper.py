"""The kernel for Hopper: its code for a GPU that is not here. Its numbers are tested in tests/gpu."""

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from compile_only import compile_tile
from kernel_checks import HOPPER_FORMS, apart, product

from qcompile import products
from qcompile.bench.tuning import HOPPER
from qcompile.lowering import scaled_mm_hopper, scaled_mm_kernel
from qcompile.lowering.devices import device_of
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import Row, Table, Tile, choose_tile

DTYPES = {"int8": "s32.s8.s8", "fp8": "f32.e4m3.e4m3", "fp8_e5m2": "f32.e5m2.e5m2"}
TILES = [Tile(*sizes, hopper=True) for sizes in HOPPER]


def check(tile: Tile, dtype: str, activation: str) -> str:
    """No spilled register, shared memory within limits, operands by TMA; the assembler's input."""
    built = compile_tile(tile, dtype, 90, activation=activation)
    device = device_of(Target("cuda", 90))
    assert device is not None
    assert built.tma
    assert built.stack == 0, f"{tile} {dtype} {activation} spills {built.stack} bytes per thread"
    assert built.shared <= device.shared
    width = min(tile.block_n, 128 if dtype == "int8" else 256)
    assert built.instructions == {("wgmma.mma_async", f"sync.aligned.m64n{width}k32.{DTYPES[dtype]}")}
    return built.ptx


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_compiles_well(tile: Tile, dtype: str) -> None:
    """With bias and residual, and the longest epilogue."""
    check(tile, dtype, "gelu")


@pytest.mark.parametrize("activation", ["", *products.ACTIVATIONS])
def test_every_activation_compiles_well(activation: str) -> None:
    for tile in TILES[:2]:
        check(tile, "int8", activation)


def test_the_next_product_is_issued_before_the_last_is_done() -> None:
    """What Triton by itself does not do for int8, and why this kernel exists; and one warp loads."""
    ptx = check(TILES[0], "int8", "")
    loop = ptx[ptx.index("wgmma.mma_async") :]
    loop = loop[: loop.index("mbarrier.arrive")]
    assert "wgmma.wait_group.sync.aligned \t1" in loop or "wgmma.wait_group.sync.aligned 1" in loop
    # Every warp has read a stage before it is said to be free.
    assert loop.index("wgmma.wait_group") < loop.index("bar.sync")
    loading = ptx[: ptx.index("cp.async.bulk.tensor")]
    assert loading.rindex("mbarrier.try_wait") < loading.rindex("mbarrier.arrive.expect_tx")
    assert f"setmaxnreg.dec.sync.aligned.u32 \t{scaled_mm_hopper.LOADING_REGISTERS}" in ptx


def operands(m: int, n: int, k: int) -> tuple[Any, ...]:
    found = product(m, n, k)
    return apart(found.x), apart(found.weight), found.x_scale, found.weight_scale, None, None


def test_one_program_per_multiprocessor_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled_mm_hopper, "_processors", lambda device: 5)
    for m, programs in ((60, 2), (64, 2), (65, 4), (640, 5)):
        tile = HOPPER_FORMS["hopper"]
        kernel, out, grid, arguments, constants = scaled_mm_kernel.launch_of(
            operands(m, 100, 70), "silu", torch.bfloat16, tile
        )
        assert kernel is scaled_mm_hopper.scaled_mm_kernel
        assert (tuple(out.shape), out.dtype, grid) == ((m, 100), torch.bfloat16, (programs, 1))
        assert arguments[0].shape == (m, 70)
        assert arguments[0].block_shape == [64, 32]
        assert constants["ACTIVATION"] == "silu"
        assert constants["COLUMNS"] == 32


def test_rows_that_tma_cannot_read_go_to_the_other_kernel() -> None:
    x, weight, *rest = operands(64, 100, 70)
    for bad in ((x.contiguous(), weight), (x, weight.T.contiguous().T), (x[:, 1:], weight[:, 1:])):
        kernel, _, grid, _, constants = scaled_mm_kernel.launch_of(
            (*bad, *rest), "", torch.bfloat16, HOPPER_FORMS["hopper"]
        )
        assert kernel is scaled_mm_kernel.scaled_mm_kernel
        assert grid == (2, 1)
        assert not constants["TMA"]


def test_a_triton_without_this_gluon_has_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled_mm_kernel, "_hopper", lambda: None)
    kernel, *_ = scaled_mm_kernel.launch_of(operands(64, 100, 70), "", torch.bfloat16, HOPPER_FORMS["hopper"])
    assert kernel is scaled_mm_kernel.scaled_mm_kernel


def test_only_hopper_gets_it() -> None:
    for capability, expected in ((80, False), (90, True), (100, False), (120, False)):
        device = device_of(Target("cuda", capability))
        assert device is not None
        assert choose_tile(4096, 4096, 4096, "int8", device).hopper == expected
        for other in (Table("NVIDIA H200", "measured", (Row("int8", None, None, None, TILES[0]),)), None):
            tile = choose_tile(4096, 4096, 4096, "int8", device, other)
            assert tile.hopper == expected
            assert tile == dataclasses.replace(TILES[0], hopper=expected) or other is None


def test_the_operator_and_its_fake_agree() -> None:
    with torch._subclasses.FakeTensorMode():
        x, weight = torch.empty(5, 64, dtype=torch.int8), torch.empty(9, 64, dtype=torch.int8)
        tile = TILES[0].to_ints()
        operands = x, weight, torch.empty(5), torch.empty(9), None, None
        y = scaled_mm_hopper.scaled_mm_op(*operands, "", torch.float16, tile)
        general = scaled_mm_kernel.scaled_mm_op(*operands, "", torch.float16, [0, *tile])
    for found in (y, general):
        assert (tuple(found.shape), found.dtype) == ((5, 9), torch.float16)
