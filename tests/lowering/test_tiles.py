"""Tile choice is pure, total, and fed by tables; what is no table is refused in one line."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcompile.errors import ConfigError
from qcompile.lowering import tiles
from qcompile.lowering.devices import DEVICES, device_of
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import Row, Table, Tile, by_bucket, choose_tile, load, load_measured, pick

SM90 = next(device for device in DEVICES if device.capability == 90)
WITH_TRITON = [device for device in DEVICES if device.triton]


@pytest.mark.parametrize("device", WITH_TRITON, ids=lambda device: f"sm{device.capability}")
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_every_product_gets_a_tile(device: tiles.Device, dtype: str) -> None:
    if dtype == "fp8" and not device.fp8:
        return
    for m in (1, 16, 17, 100, 513, 100_000):
        for n, k in ((1, 1), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)):
            tile = choose_tile(m, n, k, dtype, device)
            assert 1 <= tile.split <= tiles.MOST_PARTS
            assert tile.split == 1 or -(-k // tile.block_k) >= tile.split * tiles.FEWEST_STEPS


def test_decode_fills_the_card() -> None:
    """Llama-3 8B, one token: with two tile shapes and no split, o_proj would run on half of an H100."""
    for n, k in ((6144, 4096), (4096, 4096), (4096, 14336)):
        tile = choose_tile(1, n, k, "int8", SM90)
        assert tile.block_m == 16
        assert tile.split * n / tile.block_n > 132 / 2
    assert choose_tile(1, 4096, 14336, "int8", SM90).split > 1
    assert choose_tile(1, 28672, 4096, "int8", SM90).split == 1, "there are more tiles than processors already"
    assert choose_tile(8192, 4096, 14336, "int8", SM90).split == 1


def test_tokens_count_by_bucket() -> None:
    assert choose_tile(17, 4096, 4096, "int8", SM90) == choose_tile(32, 4096, 4096, "int8", SM90)
    assert [tiles.bucket(m) for m in (1, 16, 17, 8192, 8193)] == [16, 16, 32, 8192, 8192]


def test_a_list_for_all_buckets_says_what_each_call_would_get() -> None:
    entries = by_bucket(4096, 4096, "int8", SM90)
    for m in (1, 16, 17, 128, 129, 5000, 8192, 10**6):
        assert pick(entries, m) == choose_tile(m, 4096, 4096, "int8", SM90)
    assert pick([0, *Tile(16, 32, 64).to_ints()], 12345) == Tile(16, 32, 64)


def test_tiles_as_numbers() -> None:
    tile = Tile(64, 128, 32, 8, 2, 4, 1, True, 0)
    assert Tile.from_ints(tile.to_ints()) == tile
    assert all(type(value) is int for value in tile.to_ints())


def test_measured_rows_win_and_the_most_fitting_first() -> None:
    measured = Table("here", "measured", (
        Row("int8", 16, None, None, Tile(16, 16, 32)),
        Row("int8", 64, 4096, 4096, Tile(32, 32, 32)),
        Row("int8", 16, 4096, 4096, Tile(16, 32, 64)),
        Row("int8", 16, 4096, None, Tile(16, 64, 64)),
    ))  # fmt: skip
    assert choose_tile(1, 4096, 4096, "int8", SM90, measured) == Tile(16, 32, 64)
    assert choose_tile(40, 4096, 4096, "int8", SM90, measured) == Tile(32, 32, 32)
    assert choose_tile(1, 4096, 1024, "int8", SM90, measured) == Tile(16, 64, 64)
    far = Table("here", "measured", (Row("int8", None, 4096, 4096, Tile(16, 32, 64)),))
    assert choose_tile(4096, 4096, 4096, "int8", SM90, far) == Tile(16, 32, 64)
    assert choose_tile(1, 4096, 4096, "int8", SM90, far) == choose_tile(1, 4096, 4096, "int8", SM90)
    assert choose_tile(1, 64, 64, "int8", SM90, measured) == Tile(16, 16, 32)
    assert choose_tile(100, 64, 64, "int8", SM90, measured) == choose_tile(100, 64, 64, "int8", SM90)
    assert choose_tile(1, 4096, 4096, "fp8", SM90, measured) == choose_tile(1, 4096, 4096, "fp8", SM90)


@pytest.mark.parametrize("path", sorted(tiles.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_packaged_tables_say_where_they_come_from(path: Path) -> None:
    table = load(path)
    assert table.source.startswith("heuristic") or "measured" in table.source
    if table.source.startswith("heuristic"):
        assert "never measured" in table.source or "a few measurements" in table.source
    if not is_of_a_kind(path):
        assert table.source.startswith("measured"), "a card has a table of its own because it was measured"
        return
    assert table.device == path.stem
    for dtype in {row.dtype for row in table.rows}:
        assert any(row.dtype == dtype and row.m is row.n is row.k is None for row in table.rows), "a last row"


def is_of_a_kind(path: Path) -> bool:
    """sm90.json, and not one card's."""
    return path.stem in {device.table for device in WITH_TRITON}


def test_no_table_is_left_over() -> None:
    paths = list(tiles.FOLDER.glob("*.json"))
    assert {path.stem for path in paths if is_of_a_kind(path)} == {device.table for device in WITH_TRITON}
    assert all(is_of_a_kind(path) or tiles.card_path(load(path).device) == path for path in paths)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Table]:
    """The packaged tables, and one more of a card that was measured."""
    for path in tiles.FOLDER.glob("*.json"):
        if is_of_a_kind(path):
            (tmp_path / path.name).write_text(path.read_text())
    table = Table("NVIDIA H200", "measured", (Row("int8", 16, 4096, 4096, Tile(16, 32, 64, tma=True)),))
    (tmp_path / "nvidia_h200.json").write_text(table.to_json())
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    tiles.card.cache_clear()
    yield table
    tiles.card.cache_clear()


def test_a_cards_own_table_wins_over_that_of_its_kind(own: Table) -> None:
    tile = own.rows[0].tile
    assert choose_tile(1, 4096, 4096, "int8", SM90, name="NVIDIA H200") == tile
    assert pick(by_bucket(4096, 4096, "int8", SM90, name="NVIDIA H200"), 1) == tile
    users = Table("here", "measured", (Row("int8", 16, 4096, 4096, Tile(16, 16, 32)),))
    assert choose_tile(1, 4096, 4096, "int8", SM90, users, "NVIDIA H200") == Tile(16, 16, 32)
    for name, n, dtype in (("", 4096, "int8"), ("NVIDIA H100", 4096, "int8"), ("NVIDIA H200", 64, "int8"),
                           ("NVIDIA H200", 4096, "fp8")):  # fmt: skip
        assert choose_tile(1, n, 4096, dtype, SM90, name=name) == choose_tile(1, n, 4096, dtype, SM90)
        assert choose_tile(1, n, 4096, dtype, SM90, name=name) != tile


def test_cublas_is_for_what_was_measured() -> None:
    """Rows of one product on one card, fp8; it survives a graph's integers."""
    for path in tiles.FOLDER.glob("*.json"):
        some = [row for row in load(path).rows if row.tile.cublas]
        assert all(row.dtype == "fp8" and row.n is not None and row.k is not None for row in some)
        assert not some or not is_of_a_kind(path)
    tile = Tile(128, 64, 64, cublas=True)
    users = Table("here", "measured", (Row("fp8", 2048, 4096, 4096, tile),))
    picked = [pick(by_bucket(4096, 4096, "fp8", SM90, users), m) for m in (512, 513, 2048, 2049)]
    assert [found.cublas for found in picked] == [False, True, True, False]
    assert picked[1] == tile
    other = device_of(Target("cuda", 89))
    assert other is not None
    assert not choose_tile(2048, 4096, 4096, "fp8", other, users).cublas, "a table from elsewhere"


def test_where_a_cards_table_is() -> None:
    assert tiles.card_path("NVIDIA H200").name == "nvidia_h200.json"
    assert tiles.card_path("NVIDIA GeForce RTX 4090").name == "nvidia_geforce_rtx_4090.json"
    assert tiles.card_path("NVIDIA H100 80GB HBM3 (PCIe)").name == "nvidia_h100_80gb_hbm3_pcie.json"
    assert tiles.card_path("../x/NVIDIA").parent == tiles.FOLDER


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table = Table("NVIDIA H200", 'measured "today"', (Row("fp8", 16, 32, 64, Tile(16, 32, 64, swap=True)),))
    (tmp_path / "t.json").write_text(table.to_json(), encoding="utf-8")
    assert load(tmp_path / "t.json") == table


HOPPER = dataclasses.asdict(Tile(128, 64, 64, 8, 2, hopper=True))
GOOD = {"dtype": "int8", "m": 16, "n": 8, "k": 8, "tile": dataclasses.asdict(Tile(16, 32, 64))}


@pytest.mark.parametrize(
    "broken",
    [
        "nonsense", {}, {"device": "x", "source": "y", "rows": 3}, {"device": "x", "source": "y", "rows": [3]},
        *({"device": "x", "source": "y", "rows": [{**GOOD, **change}]} for change in (
            {"dtype": "int4"}, {"m": 0}, {"n": "8"}, {"k": True}, {"tile": {}}, {"tile": {**GOOD["tile"], "more": 1}},  # type: ignore[dict-item]
            *({"tile": {**GOOD["tile"], name: value}} for name, value in (  # type: ignore[dict-item]
                ("block_m", 24), ("block_n", 8), ("block_k", 16), ("block_k", "64"), ("warps", 3), ("warps", 32),
                ("stages", 0), ("split", 9), ("split", -1), ("group", 0), ("swap", 1), ("hopper", 1), ("programs", 1),
                ("cublas", True), ("cublas", 1),
            )),
            *({"tile": {**HOPPER, name: value}} for name, value in (
                ("block_m", 64), ("warps", 2), ("warps", 16), ("block_n", 32), ("split", 2), ("split", 0),
                ("swap", True), ("tma", True), ("stages", 1),
            )),
        )),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_table_is_refused_in_one_line(broken: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(broken if isinstance(broken, str) else json.dumps(broken))
    with pytest.raises(ConfigError, match="a tile table must be") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a tile table must be"):
        load_measured(str(tmp_path / "none.json"), Target("cuda", 90))


def test_a_table_of_another_gpu_is_taken_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(Table("NVIDIA H200", "measured", ()).to_json())
    with pytest.warns(UserWarning, match="NVIDIA H200, this is NVIDIA A100"):
        load_measured(str(path), Target("cuda", 80, name="NVIDIA A100"))
    assert load_measured(str(path), Target("cuda", 90, name="NVIDIA H200")).rows == ()
    assert load_measured(str(path), Target("cuda", 90)).rows == (), "a GPU that is not here has no name"


def test_an_unknown_gpu_gets_tiles() -> None:
    device = device_of(Target("cuda", 130))
    assert device is not None
    assert choose_tile(1, 4096, 4096, "fp8", device).block_m == 16
