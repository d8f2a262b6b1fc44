"""The kernel of experts for GPUs that are not here; its numbers are in tests/interpreter."""

import pytest
import torch

from qcompile.lowering.devices import device_of
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import BUCKETS, Tile, choose_tile

pytest.importorskip("triton")

from compile_only import compile_grouped

from qcompile.lowering import scaled_grouped_mm_kernel as kernel

EXPERTS = {8: (28672, 4096), 128: (1536, 2048)}  # Mixtral's gate and up, Qwen3's


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_every_tile_compiles_well(capability: int, dtype: str) -> None:
    """No spilled register, shared memory within limits, the matrix instruction of the operands' own type."""
    target = Target("cuda", capability, name="NVIDIA H200" if capability == 90 else "")
    device = device_of(target)
    assert device is not None
    if dtype == "fp8" and not device.fp8:
        return
    chosen = {
        kernel.plain(choose_tile(m, n, k, dtype, device, None, target.name)): experts
        for experts, (n, k) in EXPERTS.items()
        for m in BUCKETS
    }
    assert len(chosen) > 1
    for tile, experts in chosen.items():
        built = compile_grouped(tile, dtype, capability, experts)
        assert built.stack == 0, f"{tile} spills {built.stack} bytes per thread"
        assert built.shared <= device.shared, f"{tile} needs {built.shared} bytes of shared memory"
        assert built.instructions, f"{tile} has no matrix instruction"
        kinds = ("s8.s8", "kind::i8") if dtype == "int8" else ("e4m3.e4m3", "kind::f8f6f4")
        operands = [operand for _, operand in built.instructions]
        assert all(any(kind in operand for kind in kinds) for operand in operands), operands


def test_a_tile_of_products_becomes_one_of_experts() -> None:
    assert kernel.plain(Tile(16, 64, 128, split=8, swap=True)) == Tile(16, 64, 128, swap=True)
    hopper = Tile(128, 256, 128, warps=8, stages=4, hopper=True, cublas=True)
    assert kernel.plain(hopper) == Tile(128, 128, 128, warps=8, stages=4)
    assert kernel.plain(Tile(256, 128, 64, warps=8)) == Tile(128, 128, 64, warps=8)


def test_the_operator_and_its_fake_agree() -> None:
    with torch._subclasses.FakeTensorMode():
        x, weight = torch.empty(7, 16, dtype=torch.int8), torch.empty(4, 24, 16, dtype=torch.int8)
        scales = torch.empty(7), torch.empty(4, 24)
        tiles = [0, *Tile(16, 16, 32).to_ints()]
        offsets = torch.empty(4, dtype=torch.int32)
        y = kernel.scaled_grouped_mm_op(x, weight, *scales, offsets, torch.bfloat16, tiles)
    assert (y.shape, y.dtype) == ((7, 24), torch.bfloat16)
