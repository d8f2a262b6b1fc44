"""The Triton kernel: its numbers in a process that interprets it, its code for GPUs that are not here."""

import dataclasses
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy
import pytest
import torch

from qcompile import products
from qcompile.lowering.devices import Device, device_of
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import Tile, packaged

pytest.importorskip("triton")

from compile_only import compile_tile
from kernel_checks import FORMS

TESTS = Path(__file__).parents[1]
EVERYTHING = os.environ.get("QCOMPILE_EVERY_KERNEL") == "1"
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
    assert built.tma == (tile.tma and row.tma), f"{tile} loads its operands otherwise on sm{capability}"
    assert built.stack == 0, f"{tile} spills {built.stack} bytes per thread on sm{capability}"
    assert built.shared <= row.shared, f"{tile} needs {built.shared} bytes of shared memory on sm{capability}"
    expected = row.instruction[dtype != "int8"]
    assert built.instructions, f"{tile} has no matrix instruction on sm{capability}"
    for name, operands in built.instructions:
        assert name == {"wgmma": "wgmma.mma_async"}.get(expected, expected), f"{tile} on sm{capability}: {name}"
        kinds = {"int8": "s8.s8", "fp8": "e4m3.e4m3", "fp8_e5m2": "e5m2.e5m2"}[dtype]
        assert kinds in operands or "kind::f8f6f4" in operands, f"{tile} on sm{capability}: {operands}"


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


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_the_persistent_form_compiles_well(dtype: str) -> None:
    """No table has it yet: it is for `qcompile tune` to find out where it wins."""
    check(Tile(128, 256, 128, warps=8, stages=3, programs=132), dtype, 90, activation="", even=True, extras=False)


@pytest.mark.parametrize("capability", [90, 100])
def test_every_tile_compiles_well_by_tma(capability: int) -> None:
    """As `qcompile tune` tries them. (On sm100 some spill a little: split ones in fp8, persistent ones in int8.)"""
    whole = [(dtype, tile) for dtype, tile in every_tile(capability) if tile.split == 1]
    for dtype, tile in whole if EVERYTHING else whole[::5]:
        check(dataclasses.replace(tile, tma=True), dtype, capability)
        if capability == 90:
            check(dataclasses.replace(tile, tma=True, programs=132), dtype, capability)
            check(dataclasses.replace(tile, tma=True, split=2), dtype, capability)


def test_the_checks_bite() -> None:
    """A tile that spills is seen to spill, and fp8 with few rows, not swapped, is seen to be multiplied as float16."""
    assert compile_tile(Tile(128, 256, 32, warps=4, stages=2), "int8", 80, activation="", even=True).stack > 100
    with pytest.raises(AssertionError, match="mma.sync"):
        check(Tile(16, 64, 128, warps=4, stages=4), "fp8", 90)
    with pytest.raises(AssertionError, match="shared memory"):
        check(Tile(32, 64, 128, warps=4, stages=10), "int8", 89)
    assert not compile_tile(Tile(64, 64, 64, tma=True), "int8", 89).tma


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
