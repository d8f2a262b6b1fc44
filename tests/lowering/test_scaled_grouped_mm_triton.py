"""Experts on NVIDIA GPUs: which get the kernel, and the tiles of an expert's share of the rows."""

import pytest
import torch

from qcompile.lowering.devices import device_of
from qcompile.lowering.scaled_grouped_mm_triton import mean_rows
from qcompile.lowering.scaled_mm_triton import tiles_for
from qcompile.lowering.select import select_scaled_grouped_mm
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import by_bucket, choose_tile, pick

pytest.importorskip("triton")
SM90 = Target("cuda", 90)
INT8 = torch.empty(4, 16, dtype=torch.int8)


@pytest.mark.parametrize(("target", "name"), [
    (Target("cuda", 80), "grouped_triton"), (SM90, "grouped_triton"), (Target("cuda", 75), "grouped_reference"),
    (Target("mps"), "grouped_reference"),
])  # fmt: skip
def test_what_gets_it(target: Target, name: str) -> None:
    implementation, refusals = select_scaled_grouped_mm(target, INT8, INT8)
    assert implementation.name == name
    assert bool(refusals) == (target == Target("cuda", 75))


def test_tiles_are_those_of_an_experts_share() -> None:
    device = device_of(SM90)
    assert device is not None
    x, weight = torch.empty(2 * 4096, 2048, device="meta"), torch.empty(128, 1536, 2048, device="meta")
    x, weight = x.to(torch.int8), weight.to(torch.int8)
    assert mean_rows(x, weight) == 64
    first, *tile = tiles_for(64, weight, SM90, None)
    assert first == 0
    assert pick([first, *tile], 64) == choose_tile(64, 1536, 2048, "int8", device)
    assert mean_rows(x[:8], weight) == 1
    assert pick(tiles_for(1, weight, SM90, None), 0) == choose_tile(1, 1536, 2048, "int8", device)


def test_a_number_of_rows_that_only_the_call_knows_gets_every_bucket() -> None:
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    device = device_of(SM90)
    assert device is not None
    free = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])  # type: ignore[call-arg]
    mode = torch._subclasses.FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.empty(6, 64, dtype=torch.int8), symbolic_context=free)
    weight = torch.empty(4, 32, 64, dtype=torch.int8)
    assert not isinstance(x.shape[0], int)
    assert isinstance(mean_rows(x, weight), torch.SymInt)
    assert tiles_for(mean_rows(x, weight), weight, SM90, None) == by_bucket(32, 64, "int8", device)
