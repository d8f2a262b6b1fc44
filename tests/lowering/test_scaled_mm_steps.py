"""What both kernels share; their numbers are tested in tests/interpreter and tests/gpu."""

import itertools

import pytest

pytest.importorskip("triton")

from qcompile import products
from qcompile.lowering import scaled_mm_hopper, scaled_mm_kernel, scaled_mm_steps


def test_both_kernels_compile_the_same_functions() -> None:
    for name in ("place", "finish"):
        for module in (scaled_mm_kernel, scaled_mm_hopper):
            assert getattr(module, name).fn is getattr(scaled_mm_steps, name)
    assert scaled_mm_hopper.place.is_gluon()
    assert not scaled_mm_kernel.place.is_gluon()


@pytest.mark.parametrize("group", [1, 3, 8])
def test_every_tile_has_one_place(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled_mm_steps.tl, "minimum", min)
    for tiles_m, tiles_n in ((1, 1), (7, 5), (16, 3)):
        found = [scaled_mm_steps.place(tile, tiles_m, tiles_n, group) for tile in range(tiles_m * tiles_n)]
        assert sorted(found) == sorted(itertools.product(range(tiles_m), range(tiles_n)))
        first = min(group, tiles_m)
        assert {row for row, _ in found[:first]} == set(range(first)), "a group's rows first"


def test_every_activation_has_a_number_of_columns() -> None:
    assert set(scaled_mm_hopper.COLUMNS) == {"", *products.ACTIVATIONS}
