"""Tile search, with a clock that is not a GPU's: what is tried, what is kept, and what is refused."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from checkpoints import float_folder

from qcompile.bench import tuning
from qcompile.bench.gpu_timing import compiled_form
from qcompile.errors import LoweringError
from qcompile.lowering import tiles
from qcompile.lowering.devices import device_of
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import Row, Table, Tile, choose_tile, load
from qcompile.structure import load_structure

H200 = Target("cuda", 90, name="NVIDIA H200", processors=132)
SM90 = device_of(H200)
assert SM90 is not None


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_triton_version", lambda: "3.7")


def by_area(m: int, n: int, k: int, dtype: str, tiles: Sequence[Tile]) -> dict[Tile, float]:
    return {tile: area(tile) for tile in tiles if not tile.swap}


def area(tile: Tile) -> float:
    return float(tile.block_m * tile.block_n + tile.split + tile.tma)


@pytest.mark.parametrize("m", [16, 64, 128, 512, 8192])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_candidates_begin_with_the_heuristic_and_can_run(m: int, kind: str) -> None:
    assert SM90 is not None
    found = tuning.candidates(m, 4096, 14336, kind, SM90)
    assert found[0] == choose_tile(m, 4096, 14336, kind, SM90)
    assert 5 < len(found) == len(set(found)) <= 75
    assert all(tile.split == 1 or not tile.tma for tile in found)
    assert any(tile.split > 1 for tile in found) == (m <= 512)
    assert any(tile.hopper for tile in found) == (m > 64)
    for tile in found:
        tiles._check(tile)
    assert [tile for tile in found if tile.cublas] == (
        [dataclasses.replace(found[0], cublas=True)] if kind == "fp8" else []
    )
    found = [tile for tile in found if not tile.cublas]
    whole = [tile for tile in found if tile.split == 1 and tile != found[0] and not tile.hopper]
    with_tma = {dataclasses.replace(tile, tma=False) for tile in whole if tile.tma}
    assert with_tma >= {tile for tile in whole if not tile.tma}, "each both ways"
    older = device_of(Target("cuda", 89))
    assert older is not None
    assert not any(tile.tma or tile.hopper for tile in tuning.candidates(m, 4096, 14336, kind, older))
    newer = device_of(Target("cuda", 100))
    assert newer is not None
    forms = tuning.candidates(m, 4096, 14336, kind, newer)
    assert any(tile.tma for tile in forms)
    assert not any(tile.hopper for tile in forms)


def test_what_the_card_has_already_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Tile(128, 64, 32, 8, 2, group=3)
    own = Table("NVIDIA H200", "measured", (Row("int8", 16, 64, 64, known),))
    monkeypatch.setattr(tiles, "card", lambda name: own if name else None)
    assert SM90 is not None
    assert tuning.candidates(16, 64, 64, "int8", SM90, "NVIDIA H200")[1] == known


def test_kernels_are_few() -> None:
    """Compiled once each, before anything is timed: for two models and both dtypes."""
    shapes = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (10240, 8192), (57344, 8192), (8192, 28672)]
    proposed = list(tuning.proposals(shapes, [1, 32, 128, 512, 2048, 8192], ["int8", "fp8"], H200))
    found = tuning.kernels(proposed)
    assert len(found) <= 200 < 2000 < sum(len(tiles) for *_, tiles in proposed)
    forms = {(dtype, compiled_form(tile)) for _, _, _, dtype, tiles in proposed for tile in tiles}
    assert {(dtype, compiled_form(tile)) for _, _, dtype, tile in found} == forms
    odd = tuning.kernels([(16, 64, 64, "int8", [SMALL]), (16, 63, 64, "int8", [SMALL]), (16, 64, 65, "int8", [SMALL]),
                        (32, 128, 96, "int8", [SMALL, dataclasses.replace(SMALL, group=2)])])  # fmt: skip
    assert [(n, k) for n, k, _, _ in odd] == [(64, 64), (63, 64), (64, 65)]


def test_the_fastest_is_kept(table: None) -> None:
    lines: list[str] = []
    found = tuning.tune([(4096, 4096), (64, 64), (64, 64)], [1, 5, 8192], "int8", H200, by_area, lines.append)
    assert [(row.m, row.n, row.k) for row in found.rows] == [
        (16, 4096, 4096), (None, 4096, 4096), (16, 64, 64), (None, 64, 64),
    ]  # fmt: skip
    for row in found.rows:
        assert SM90 is not None
        assert row.n is not None
        assert row.k is not None
        tried = by_area(0, 0, 0, "", tuning.candidates(row.m or 8192, row.n, row.k, "int8", SM90))
        assert area(row.tile) == min(tried.values())
    assert found.device == "NVIDIA H200"
    assert found.source.startswith("measured 20")
    assert len(lines) == 4
    assert "M ≤ 8192, N = 64, K = 64" in lines[3]


def test_shapes_where_nothing_runs_are_left_out(table: None) -> None:
    def only_wide(m: int, n: int, k: int, dtype: str, tiles: Sequence[Tile]) -> dict[Tile, float]:
        return {} if n == 64 else dict.fromkeys(tiles, 1.0)

    found = tuning.tune([(64, 64), (4096, 64)], [1], "fp8", H200, only_wide)
    assert [row.n for row in found.rows] == [4096]
    with pytest.raises(LoweringError, match="none did"):
        tuning.tune([(64, 64)], [1], "fp8", H200, only_wide)


def test_cublas_is_kept_with_the_best_of_our_own(table: None) -> None:
    """For what it does not take; and only where it wins."""
    best = Tile(128, 256, 128, 8, 3)

    def measured(theirs: float) -> tuning.Found:
        def times(m: int, n: int, k: int, dtype: str, tiles: Sequence[Tile]) -> dict[Tile, float]:
            return {tile: theirs if tile.cublas else 5.0 + (tile != best) for tile in tiles}

        (found,) = tuning.search([(4096, 4096)], [8192], ["fp8"], H200, times)
        return found

    assert measured(4.0) == tuning.Found("fp8", 8192, 4096, 4096, dataclasses.replace(best, cublas=True), 4.0, 6.0, 5.0)
    assert "4.0 µs (cuBLAS; our kernels 5.0 µs), heuristic 6.0 µs" in str(measured(4.0))
    assert measured(5.5) == tuning.Found("fp8", 8192, 4096, 4096, best, 5.0, 6.0, 5.0)
    assert "cuBLAS" not in str(measured(5.5))

    def alone(m: int, n: int, k: int, dtype: str, tiles: Sequence[Tile]) -> dict[Tile, float]:
        return {tile: 3.0 for tile in tiles if tile.cublas}

    (found,) = tuning.search([(4096, 4096)], [8192], ["fp8"], H200, alone)
    assert SM90 is not None
    assert found.tile == dataclasses.replace(choose_tile(8192, 4096, 4096, "fp8", SM90), cublas=True)
    assert (found.time, found.own) == (3.0, tuning.UNKNOWN), "none of ours ran"


def test_a_card_that_has_cublas_tries_our_own_again(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Tile(128, 64, 32, 8, 2, group=3, cublas=True)
    own = Table("NVIDIA H200", "measured", (Row("fp8", 16, 64, 64, known),))
    monkeypatch.setattr(tiles, "card", lambda name: own if name else None)
    assert SM90 is not None
    found = tuning.candidates(16, 64, 64, "fp8", SM90, "NVIDIA H200")
    assert found[1] == dataclasses.replace(known, cublas=False)
    assert sum(tile.cublas for tile in found) == 1


def test_both_dtypes_in_one_search() -> None:
    found = list(tuning.search([(64, 64), (128, 64)], [1, 32], ["int8", "fp8"], H200, by_area))
    assert [(best.n, best.m, best.dtype) for best in found] == [
        (n, m, dtype) for n in (64, 128) for m in (16, 32) for dtype in ("int8", "fp8")
    ]
    assert all(best.row() is not None and best.time <= best.heuristic for best in found)


class Bench:
    """Clocks that say how often they were looked at: what a tile takes, but the first looks are disturbed."""

    def __init__(self, takes: dict[Tile, float], disturbed: dict[Tile, float] | None = None) -> None:
        self.takes, self.disturbed = takes, disturbed or {}
        self.looks: list[Tile] = []

    def clock_of(self, tile: Tile) -> Callable[[], float] | None:
        if tile not in self.takes:
            return None

        def look() -> float:
            self.looks.append(tile)
            early = self.looks.count(tile) <= tuning.BRIEFLY
            return self.disturbed.get(tile, self.takes[tile]) if early else self.takes[tile]

        return look


TILES = [Tile(16, 16, 32 << i, group=8) for i in range(5)] + [Tile(32, 32, 32 << i, group=8) for i in range(3)]
SMALL = TILES[0]


def test_the_best_few_are_measured_again_in_turns() -> None:
    takes = {tile: 10.0 + i for i, tile in enumerate(TILES)}
    bench = Bench({tile: time for tile, time in takes.items() if tile != TILES[3]}, {TILES[2]: 10.5, TILES[0]: 11.5})
    found = tuning.two_rounds(TILES, bench.clock_of, lambda tile: True)
    assert found == {TILES[i]: takes[TILES[i]] for i in (0, 1, 2, 4)}, "what the second round said"
    late = bench.looks[tuning.BRIEFLY * (len(TILES) - 1) :]
    assert late == [TILES[2], TILES[1], TILES[0], TILES[4]] * tuning.CAREFULLY


def test_wrong_tiles_are_passed_over_and_the_heuristic_is_always_measured() -> None:
    takes = {tile: 20.0 - i for i, tile in enumerate(TILES)}
    found = tuning.two_rounds(TILES, Bench(takes).clock_of, lambda tile: tile != TILES[-1])
    assert list(found) == [TILES[i] for i in (6, 5, 4, 3, 0)]
    assert tuning.two_rounds(TILES, Bench(takes).clock_of, lambda tile: False) == {}
    assert tuning.two_rounds(TILES, Bench({}).clock_of, lambda tile: True) == {}


def test_leading_tiles_are_tried_in_other_groups() -> None:
    takes = {dataclasses.replace(tile, group=group): 10.0 + i + group / 100
             for i, tile in enumerate(TILES) for group in (4, 8, 16)}  # fmt: skip
    found = tuning.two_rounds(TILES, Bench(takes).clock_of, lambda tile: True)
    assert min(found, key=lambda tile: found[tile]) == dataclasses.replace(TILES[0], group=4)


def test_a_models_shapes_are_those_of_its_merged_products(tmp_path: Path) -> None:
    config = float_folder(tmp_path / "m")
    assert config is None or config is not None
    model = load_structure(str(tmp_path / "m"))
    hidden, middle = model.config.hidden_size, model.config.intermediate_size
    size = hidden // model.config.num_attention_heads
    qkv = (model.config.num_attention_heads + 2 * model.config.num_key_value_heads) * size
    assert tuning.shapes_of(model, "int8") == list(
        dict.fromkeys([(qkv, hidden), (hidden, hidden), (2 * middle, hidden), (hidden, middle)])
    )


def test_a_table_is_read_as_it_was_written(table: None, tmp_path: Path) -> None:
    found = tuning.tune([(64, 64)], [1], "int8", H200, by_area)
    (tmp_path / "t.json").write_text(found.to_json())
    assert load(tmp_path / "t.json") == found
