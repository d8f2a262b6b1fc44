"""Which tile a product gets: choose_tile(m, n, k, dtype, device), pure, from tables.

A table is a JSON file. Those in lowering/tiles are one per kind of GPU (sm90.json), heuristic until they say otherwise,
and one per card that was measured (nvidia_h200.json). `qcompile tune` writes the user's own, which win over them.
"""

import dataclasses
import functools
import json
import re
import warnings
from pathlib import Path
from typing import Any, get_type_hints

from qcompile.errors import ConfigError
from qcompile.lowering.devices import Device
from qcompile.lowering.target import Target

FOLDER = Path(__file__).parent / "tiles"
# Numbers of tokens up to which one tile is chosen and measured; beyond the last, the last one's.
BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
MOST_PARTS = 8  # lowering/inductor.py has sums of so many parts unrolled into whatever reads them
FEWEST_STEPS = 4  # of BLOCK_K that a part of a split sum is worth


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one kernel is launched.

    block_m, block_n, block_k: what one program computes at a time. warps, stages: of Triton. group: rows of tiles that
    are visited together. split: parts of K summed separately; 0 in a table means that choose_tile decides. swap:
    weight · xᵀ instead of x · weightᵀ. tma: operands by tensor memory access, where their strides allow it. hopper: by
    sm90's own kernel (scaled_mm_hopper), where there are whole rows to load; warps are those that multiply. cublas: fp8
    by torch's own product, where that takes the operands (scaled_mm_cublas); others get what the rest of the tile says.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    group: int = 8
    split: int = 1
    swap: bool = False
    tma: bool = False
    hopper: bool = False
    cublas: bool = False

    def to_ints(self) -> list[int]:
        return [int(value) for value in dataclasses.astuple(self)]

    @classmethod
    def from_ints(cls, values: list[int]) -> "Tile":
        return cls(*(kind(value) for kind, value in zip(KINDS.values(), values, strict=True)))


KINDS: dict[str, type] = get_type_hints(Tile)


@dataclasses.dataclass(frozen=True)
class Row:
    """dtype "int8" or "fp8"; m: most tokens, None for any number; n, k: of one weight's shape, None for all others.

    A row for one shape was measured at m tokens; it says nothing of a quarter as many.
    """

    dtype: str
    m: int | None
    n: int | None
    k: int | None
    tile: Tile

    def fits(self, m: int, n: int, k: int, dtype: str) -> bool:
        shape = (self.n is None or self.n == n) and (self.k is None or self.k == k)
        fewest = 0 if self.n is None else (self.m or BUCKETS[-1]) // 4
        return self.dtype == dtype and shape and (self.m is None or m <= self.m) and m > fewest


@dataclasses.dataclass(frozen=True)
class Table:
    """device: a GPU's name, or "sm90". source: "heuristic", or when and with what it was measured."""

    device: str
    source: str
    rows: tuple[Row, ...]

    def find(self, m: int, n: int, k: int, dtype: str) -> Tile | None:
        """The tile of the most fitting row: one for this shape, then the one with the least sufficient m."""
        fitting = [row for row in self.rows if row.fits(m, n, k, dtype)]
        best = min(fitting, key=lambda row: (row.n is None, row.k is None, row.m or 2**31), default=None)
        return best.tile if best else None

    def to_json(self) -> str:
        rows = [dataclasses.asdict(row) for row in self.rows]
        head = json.dumps({"device": self.device, "source": self.source}, indent=1)[:-2]
        return head + ',\n "rows": [\n  ' + ",\n  ".join(json.dumps(row) for row in rows) + "\n ]\n}\n"


def choose_tile(
    m: int, n: int, k: int, dtype: str, device: Device, measured: Table | None = None, name: str = ""
) -> Tile:
    """The tile for x [m, k] · weightᵀ [k, n]. dtype: "int8" or "fp8". measured: the user's own table. name: the card's.

    From the user's table, then the card's own in lowering/tiles, then that of its kind. A card's table is for cards of
    that name: splits and block sizes follow from its processors and memory, and nobody has measured that they serve
    another card of the same kind better than the heuristic does. m counts as the bucket that it falls into, so that
    equal buckets share compiled kernels.
    """
    m = bucket(m)
    own = card(name)
    tile = measured.find(m, n, k, dtype) if measured is not None else None
    tile = tile or (own.find(m, n, k, dtype) if own is not None else None)
    tile = tile or packaged(device.table).find(m, n, k, dtype)
    assert tile is not None, f"table {device.table} must have a last row for {dtype}"
    if not device.is_hopper:  # and the table another's: elsewhere torch's product is not cuBLAS's, and was not measured
        tile = dataclasses.replace(tile, hopper=False, cublas=False)
    return tile if tile.split else dataclasses.replace(tile, split=_parts(tile, m, n, k, device.processors))


def bucket(m: int) -> int:
    return next((size for size in BUCKETS if m <= size), BUCKETS[-1])


def _parts(tile: Tile, m: int, n: int, k: int, processors: int) -> int:
    """How many parts to split K into, so that every multiprocessor has a tile to work on: a power of two."""
    tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
    steps = -(-k // tile.block_k)
    parts = 1
    while parts < MOST_PARTS and 2 * parts * tiles <= processors and 2 * parts * FEWEST_STEPS <= steps:
        parts *= 2
    return parts


def by_bucket(
    n: int, k: int, dtype: str, device: Device, measured: Table | None = None, name: str = ""
) -> list[int]:
    """For a number of tokens that only the call knows: [m, *tile] for every bucket, end to end."""
    return [value for m in BUCKETS for value in (m, *choose_tile(m, n, k, dtype, device, measured, name).to_ints())]


def pick(tiles: list[int], m: int) -> Tile:
    """The tile for m tokens out of `by_bucket`'s list, or out of a list of one."""
    width = len(KINDS) + 1
    starts = range(0, len(tiles), width)
    start = next((at for at in starts if m <= tiles[at]), len(tiles) - width)
    return Tile.from_ints(tiles[start + 1 : start + width])


@functools.cache
def packaged(name: str) -> Table:
    """One of lowering/tiles."""
    return load(FOLDER / f"{name}.json")


@functools.cache
def card(name: str) -> Table | None:
    """What was measured on cards of this name; None if nothing was."""
    path = card_path(name)
    return load(path) if path.exists() else None


def card_path(name: str) -> Path:
    """Where a card's table is: nvidia_h200.json for "NVIDIA H200"."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ".json")


def load_measured(path: str, target: Target) -> Table:
    """The user's own table. Raises ConfigError; warns if it was measured on another GPU."""
    table = _load_version(Path(path), Path(path).stat().st_mtime_ns if Path(path).exists() else 0)
    if target.name and table.device != target.name:
        warnings.warn(
            f"{path} was measured on {table.device}, this is {target.name}: run qcompile tune here", stacklevel=2
        )
    return table


@functools.lru_cache(maxsize=8)
def _load_version(path: Path, modified: int) -> Table:
    return load(path)


def load(path: Path) -> Table:
    """Read a table. Raises ConfigError for what is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"a tile table must be a JSON file that qcompile tune wrote; {path}: {error}") from None
    try:
        rows = tuple(_row(entry) for entry in found["rows"])
        return Table(str(found["device"]), str(found["source"]), rows)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"a tile table must be as qcompile tune writes it; {path} has {reason}") from None


def _row(entry: Any) -> Row:
    tile = Tile(**entry["tile"])
    _check(tile)
    if entry["dtype"] not in ("int8", "fp8") or (tile.cublas and entry["dtype"] != "fp8"):
        raise ValueError(f"dtype {entry['dtype']!r}")
    for size in (entry["m"], entry["n"], entry["k"]):
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"size {size!r}")
    return Row(entry["dtype"], entry["m"], entry["n"], entry["k"], tile)


def _check(tile: Tile) -> None:
    """Raises ValueError unless the kernel can be launched with this tile."""
    for name, kind in KINDS.items():
        if type(getattr(tile, name)) is not kind:
            raise ValueError(f"{tile}: {name} must be {'true or false' if kind is bool else 'an integer'}")
    powers = all(size > 0 and size & (size - 1) == 0 for size in (tile.block_m, tile.block_n, tile.block_k, tile.warps))
    least, most = (16, 16, 32), (512, 512, 1024)
    blocks = zip(least, (tile.block_m, tile.block_n, tile.block_k), most, strict=True)
    if not powers or not all(low <= size <= high for low, size, high in blocks):
        raise ValueError(f"{tile}: blocks must be powers of two, from 16 × 16 × 32 to 512 × 512 × 1024")
    if not (0 <= tile.split <= MOST_PARTS and 1 <= tile.stages <= 8 and tile.warps <= 16 and tile.group >= 1):
        raise ValueError(f"{tile}: split, stages, warps or group out of range")
    if not tile.hopper:
        return
    whole = tile.warps in (4, 8) and tile.block_m % (16 * tile.warps) == 0 and tile.block_n >= 64
    if not whole or tile.split != 1 or tile.swap or tile.tma or tile.stages < 2:
        raise ValueError(f"{tile}: hopper needs 4 or 8 warps of 16 rows each, 64 columns, 2 stages, no other form")
