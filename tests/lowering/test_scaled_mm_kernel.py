"""The Triton kernel: its numbers in a process that interprets it, its code for GPUs that are not here."""

import dataclasses
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch

from qcompile import products
from qcompile.lowering.devices import Device, device_of
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import Tile, packaged

pytest.importorskip("triton")

from compile_only import compile_tile
from kernel_checks import FORMS, aligned_bound, aligned_error, fraction_bits, product

TESTS = Path(__file__).parents[1]
EVERYTHING = os.environ.get("QCOMPILE_EVERY_KERNEL") == "1"
TRITON = tuple(map(int, version("triton").split(".")[:2]))
CAPABILITIES = (80, 86, 89, 90, 100, 120) if EVERYTHING else (80, 89, 90, 100)


@pytest.mark.skipif(
    version("triton") < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 needs NumPy before 2.4",
)
def test_its_numbers_in_the_interpreter() -> None:
    """tests/interpreter, where Triton is imported with TRITON_INTERPRET=1."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "tests/interpreter"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 100
    assert "skipped" not in done.stdout


def device(capability: int) -> Device:
    found = device_of(Target("cuda", capability))
    assert found is not None
    return found


def every_tile(capability: int) -> list[tuple[str, Tile]]:
    """Each (dtype, tile) of a device's table, once as it is and, where choose_tile may split it, once split."""
    table = packaged(device(capability).table)
    found = []
    for row in table.rows:
        if row.dtype == "fp8" and not device(capability).fp8:
            continue
        splits = (1, 2) if row.tile.split == 0 else (row.tile.split,)
        found += [(row.dtype, dataclasses.replace(row.tile, split=split)) for split in splits]
    return list(dict.fromkeys(found))


def check(tile: Tile, dtype: str, capability: int, **options: object) -> None:
    built = compile_tile(tile, dtype, capability, **options)  # type: ignore[arg-type]
    row = device(capability)
    by_tma = (tile.tma and row.tma) or tile.hopper
    assert built.tma == by_tma, f"{tile} loads its operands otherwise on sm{capability}"
    spills = TRITON >= (3, 8) and capability == 80 and tile.block_m * tile.block_n > 128 * 128  # docs/gpu.md
    assert built.stack == 0 or spills, f"{tile} spills {built.stack} bytes per thread on sm{capability}"
    assert built.shared <= row.shared, f"{tile} needs {built.shared} bytes of shared memory on sm{capability}"
    expected = {{"wgmma": "wgmma.mma_async"}.get(name, name) for name in row.instruction[dtype != "int8"].split()}
    if dtype == "int8" and capability == 100 and TRITON >= (3, 8):  # which has the newer one for int8 too
        expected.add("tcgen05.mma")
    assert built.instructions, f"{tile} has no matrix instruction on sm{capability}"
    for name, operands in built.instructions:
        assert name in expected, f"{tile} on sm{capability}: {name}"
        kinds = {"int8": "s8.s8", "fp8": "e4m3.e4m3", "fp8_e5m2": "e5m2.e5m2"}[dtype]
        tcgen05 = "kind::i8" if dtype == "int8" else "kind::f8f6f4"
        assert kinds in operands or tcgen05 in operands, f"{tile} on sm{capability}: {operands}"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_tile_of_every_table_compiles_well(capability: int) -> None:
    """No spilled register, shared memory within limits, and the matrix instruction of the operands' own type.

    With bias, GELU, residual and masks at the end of K, the form that needs most registers.
    """
    for dtype, tile in every_tile(capability):
        check(tile, dtype, capability)


@pytest.mark.parametrize("activation", [None, *products.ACTIVATIONS] if EVERYTHING else ["silu"])
@pytest.mark.parametrize("capability", CAPABILITIES if EVERYTHING else (90,))
def test_other_forms_of_the_kernel_compile_well(capability: int, activation: str | None) -> None:
    """Whole steps of K; and on request every activation, with and without bias and residual."""
    dtypes = ("int8", "fp8", "fp8_e5m2") if device(capability).fp8 else ("int8",)
    tiles = [(dtype, tile) for dtype, tile in every_tile(capability) if tile.split == 1]
    for dtype, tile in tiles if EVERYTHING else tiles[:1] + tiles[-1:]:
        for kind in [d for d in dtypes if d[:3] == dtype[:3]]:
            check(tile, kind, capability, activation=activation or "", even=True)
            check(tile, kind, capability, activation=activation or "", even=True, extras=False)


@pytest.mark.parametrize("capability", [90, 100])
def test_every_tile_compiles_well_by_tma(capability: int) -> None:
    """As `qcompile tune` tries them. (On sm100 some split ones in fp8 spill a little.)"""
    whole = [(dtype, tile) for dtype, tile in every_tile(capability) if tile.split == 1 and not tile.hopper]
    for dtype, tile in whole if EVERYTHING else whole[::5]:
        check(dataclasses.replace(tile, tma=True), dtype, capability)
        if capability == 90:
            check(dataclasses.replace(tile, tma=True, split=2), dtype, capability)


def test_the_checks_bite() -> None:
    """A tile that spills is seen to spill, and fp8 with few rows, not swapped, is seen to be multiplied as float16."""
    assert compile_tile(Tile(128, 256, 32, warps=4, stages=2), "int8", 80, activation="", even=True).stack > 100
    with pytest.raises(AssertionError, match="mma.sync"):
        check(Tile(16, 64, 128, warps=4, stages=4), "fp8", 90)
    with pytest.raises(AssertionError, match="shared memory"):
        check(Tile(32, 64, 128, warps=4, stages=10), "int8", 89)
    assert not compile_tile(Tile(64, 64, 64, tma=True), "int8", 89).tma


def loop_of(tile: Tile, dtype: str, tokens: int | None) -> str:
    """The loop over K on sm90, without the names of its values. tokens: a number that the compiler knows."""
    import triton
    from triton.compiler import ASTSource

    built: list[Any] = []
    original = triton.compile

    def compile_and_keep(source: ASTSource, **options: Any) -> Any:
        if tokens is not None:  # as Triton and Inductor make a constant of an argument that is 1
            source.signature["M"] = "constexpr"
            at = (source.fn.arg_names.index("M"),)
            source.constants[at] = tokens
            source.attrs.pop(at)
        built.append(original(source, **options))
        return built[-1]

    with mock.patch.object(triton, "compile", compile_and_keep):
        compile_tile(tile, dtype, 90, activation="", even=True, extras=False)
    text = built[0].asm["ttgir"]
    loop = text[text.index("scf.for") : text.index("scf.yield")]
    return re.sub(r"%[\w#:]+|loc\(.*?\)", "", loop)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_one_token_has_the_loop_of_sixteen_and_reads_one_row(dtype: str, split: int) -> None:
    """Rows of x that are not there are not fetched: each copy of x is masked by row, those of the weight are not."""
    tile = next(row.tile for row in packaged("sm90").rows if row.dtype == dtype)
    tile = dataclasses.replace(tile, split=split)
    one, any_number = loop_of(tile, dtype, 1), loop_of(tile, dtype, None)
    assert one == any_number
    copies = re.findall(r"async_copy_global_to_local.*", one)
    assert [f"{tile.block_k}x{tile.block_m}x" in copy for copy in copies] == [False, True]
    assert [" other " in copy for copy in copies] == [False, True], "a mask of its own, with zeros where it is not"
    assert re.search(rf"arith.andi .*<{tile.block_k}x{tile.block_m}xi1", one)
    assert "num = 4" in one, "two steps of two copies are on their way while one is multiplied"


def test_a_kernel_serves_any_number_of_tokens_groups_and_parts() -> None:
    """Otherwise `qcompile tune` would compile ten times as many, and graphs of symbolic size at every other call."""
    from qcompile.lowering import scaled_mm_kernel

    skipped = {p.name for p in scaled_mm_kernel.scaled_mm_kernel.params if p.do_not_specialize}
    assert skipped == {"M", "GROUP_M"}
    x, weight = (torch.empty(rows, 64, dtype=torch.int8) for rows in (7, 96))
    operands = x, weight, torch.empty(7), torch.empty(96), None, None
    made = [
        scaled_mm_kernel.prepare(operands, "", torch.float32, Tile(16, 16, 32, group=group, split=split))
        for group, split in ((8, 2), (4, 8))
    ]
    assert made[0][3] == made[1][3]
    assert [grid for _, grid, _, _ in made] == [(6, 2), (6, 8)]
    assert [tuple(out.shape) for out, _, _, _ in made] == [(2, 7, 96), (8, 7, 96)]


def aligned_sums(x: torch.Tensor, weight: torch.Tensor, bits: int, group: int = 32) -> torch.Tensor:
    """x · weightᵀ as Hopper adds fp8: products and the sum so far cut off `bits` below the largest of them."""
    sums = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for begin in range(0, x.shape[1], group):
        products = x[:, None, begin : begin + group] * weight[None, :, begin : begin + group]
        largest = torch.maximum(sums.abs(), products.abs().amax(2)).clamp(min=1e-30)
        unit = 2.0 ** (largest.log2().floor() - bits)
        sums = (torch.trunc(sums / unit) + torch.trunc(products / unit[..., None]).sum(2)) * unit
    return sums


@pytest.mark.parametrize("shape", [(15, 17, 16), (129, 127, 17), (31, 15, 129), (1, 33, 4095), (17, 63, 1023)], ids=str)
def test_what_tests_on_a_gpu_allow_fp8_is_what_its_adder_needs(shape: tuple[int, int, int]) -> None:
    found = product(*shape, "fp8")
    found.x_scale, found.weight_scale = torch.ones(shape[0]), torch.ones(shape[1])
    x, weight = found.x.double(), found.weight.double()
    exact = x @ weight.T
    for bits in (13, 22):
        assert ((aligned_sums(x, weight, bits) - exact).abs() <= aligned_bound(found, bits)).all()
    assert ((aligned_sums(x, weight, 2) - exact).abs() > aligned_bound(found, 13)).any(), "it can be missed"
    error = float((aligned_sums(x, weight, 13) - exact).norm() / exact.norm())
    assert error <= aligned_error(shape[2], 13) <= (40 if shape[2] < 100 else 5) * error
    assert [fraction_bits(capability) for capability in (89, 90, 100, 120)] == [13, 13, 22, 22]


def test_the_operator_and_its_fake_agree() -> None:
    from qcompile.lowering import scaled_mm_kernel

    with torch._subclasses.FakeTensorMode():
        x, weight = torch.empty(5, 64, dtype=torch.int8), torch.empty(9, 64, dtype=torch.int8)
        scales = torch.empty(5), torch.empty(9)
        tiles = [0, *FORMS["split"].to_ints()]
        y = scaled_mm_kernel.scaled_mm_op(x, weight, *scales, None, None, "", torch.bfloat16, tiles)
    assert y.shape == (5, 9)
    assert y.dtype == torch.bfloat16
    assert torch.Tag.pt2_compliant_tag in torch.ops.qcompile_triton.scaled_mm.default.tags
