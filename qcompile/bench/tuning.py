"""Tile search: measure the tiles for a model's products on this machine's GPU, and keep the fastest in a table.

The search knows no GPU: `search` proposes tiles, `two_rounds` times them by clocks that it is given. `Bench` is the
GPU: it compiles every kernel ahead, on all cores, makes operands once per product, and gives clocks.
"""

import dataclasses
import datetime
import functools
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile import ops
from qcompile.bench import gpu_timing
from qcompile.bench.gpu_timing import (
    Operands,
    by_cublas,
    compile_kernels,
    compiled_form,
    is_right,
    product,
    random,
)
from qcompile.errors import ConfigError, LoweringError
from qcompile.lowering.devices import Device, device_of
from qcompile.lowering.target import Target, detect
from qcompile.lowering.tiles import BUCKETS, Row, Table, Tile, bucket, choose_tile

Shape = tuple[int, int]
Clock = Callable[[], float]
# M, N, K, dtype, tiles → microseconds of those that were measured with care.
Measure = Callable[[int, int, int, str, Sequence[Tile]], dict[Tile, float]]
# What is tried, besides the tile that would be taken without measuring: block_m, block_n, block_k, warps, stages, swap.
# A kernel serves every number of tokens, group and parts, so each line costs up to four compilations.
SMALL = (
    (16, 64, 128, 4, 8, True), (16, 64, 256, 4, 4, True), (16, 64, 512, 4, 3, True), (16, 128, 128, 4, 5, True),
    (16, 128, 256, 4, 3, True), (16, 64, 128, 4, 5, False), (32, 64, 128, 4, 6, True), (32, 64, 256, 4, 4, True),
    (32, 128, 128, 4, 5, True), (64, 64, 128, 4, 5, False), (64, 64, 256, 4, 3, False), (64, 64, 256, 4, 3, True),
    (64, 128, 128, 4, 4, False),
)  # fmt: skip
MIDDLE = (
    (64, 64, 128, 4, 5, False), (64, 128, 128, 4, 3, False), (64, 128, 128, 4, 4, False), (64, 256, 128, 8, 3, False),
    (64, 256, 64, 4, 5, False), (128, 64, 128, 4, 4, False), (128, 128, 128, 4, 3, False),
    (128, 128, 128, 8, 3, False), (128, 128, 128, 8, 4, False), (128, 256, 128, 8, 3, False),
    (128, 256, 128, 8, 4, False), (256, 64, 128, 8, 3, False), (256, 128, 128, 8, 3, False),
)  # fmt: skip
LARGE = (
    (64, 256, 128, 8, 3, False), (128, 128, 128, 4, 3, False), (128, 128, 128, 8, 3, False),
    (128, 256, 128, 8, 3, False), (128, 256, 128, 8, 4, False), (128, 256, 64, 8, 4, False),
    (256, 128, 128, 8, 3, False),
)  # fmt: skip
# Hopper's own kernel: block_m, block_n, block_k, warps, stages. Beside it few of the others are worth a look.
HOPPER = (
    (256, 128, 128, 8, 4), (128, 256, 128, 8, 4), (128, 128, 128, 8, 6), (128, 128, 128, 4, 6), (64, 256, 128, 4, 5),
    (128, 64, 128, 4, 8), (64, 128, 128, 4, 8),
)  # fmt: skip
LARGE_BESIDE_HOPPER = ((128, 256, 128, 8, 3, False), (128, 256, 128, 8, 4, False))
GROUPS = (4, 16)  # besides the usual 8, for the leading tiles
BRIEFLY, FINALISTS, CAREFULLY = 3, 4, 15  # replays of every tile; how many tiles go on; replays of those
UNKNOWN = float("inf")


def gpu_for(dtype: str) -> Target:
    """The GPU to measure on, by a dtype of options. Raises LoweringError if there is none that runs our kernels."""
    from qcompile.lowering import scaled_mm_triton

    if not torch.cuda.is_available():
        raise LoweringError("tune measures on a GPU; this machine has none that torch can use; see qcompile doctor")
    target = detect(torch.device("cuda", torch.cuda.current_device()))
    example = torch.empty(16, 64, dtype=ops.TORCH_DTYPES[dtype], device="meta")
    if reason := scaled_mm_triton.runs_on(target) or scaled_mm_triton.takes(target, example, example):
        raise LoweringError(f"tune measures Triton kernels; here that {reason}")
    return target


def shapes_of(model: Any, dtype: str) -> list[Shape]:
    """(N, K) of every product that the backend would make of a model, merged siblings as one, each once."""
    from qcompile import passes
    from qcompile.capture import capture_call
    from qcompile.config import Config
    from qcompile.explanation import example_call

    config = Config.from_options({"dtype": dtype})
    found: dict[Shape, None] = {}
    for captured in capture_call(model, example_call(model)):
        graph, _ = passes.quantizing(config).run(captured.graph)
        for node in graph.graph.find_nodes(op="call_function", target=ops.scaled_mm):
            n, k = node.args[1].meta["val"].shape
            found[int(n), int(k)] = None
    if not found:
        raise ConfigError("the model must have linears to quantize; this one has none; give --shape N,K")
    return list(found)


def candidates(m: int, n: int, k: int, kind: str, device: Device, name: str = "") -> list[Tile]:
    """Tiles worth measuring; first the heuristic one, then what the card's table has. kind: "int8" or "fp8".

    Each as it is and, where it gives fewer tiles than the processors could take, with K split; by TMA where K is whole;
    on Hopper, its own kernel's, and fp8 by cuBLAS last, whatever the tile.
    """
    first = choose_tile(m, n, k, kind, device)
    found = [first, choose_tile(m, n, k, kind, device, name=name)]
    large = LARGE_BESIDE_HOPPER if device.is_hopper else LARGE
    for block_m, block_n, block_k, warps, stages, swap in SMALL if m <= 64 else MIDDLE if m <= 512 else large:
        tile = Tile(block_m, block_n, block_k, warps, stages, swap=swap)
        if _operand_bytes(tile) > device.shared or (m <= 64 and not bucket(m) <= 2 * block_m <= 2 * max(16, bucket(m))):
            continue
        tiles = -(-m // block_m) * -(-n // block_n)
        found += [tile, dataclasses.replace(tile, tma=True)] if device.tma else [tile]
        splits = [s for s in (2, 4, 8) if s * tiles <= 4 * device.processors and s * block_k <= k]
        found += [dataclasses.replace(tile, split=split) for split in splits]
    if device.is_hopper and m > 64:
        found += [Tile(*sizes, hopper=True) for sizes in HOPPER]
    own = [dataclasses.replace(tile, cublas=False) for tile in found]
    library = [dataclasses.replace(first, cublas=True)] if kind == "fp8" and device.is_hopper else []
    return list(dict.fromkeys([*own, *library]))


def _operand_bytes(tile: Tile) -> int:
    return (tile.block_m + tile.block_n) * tile.block_k * max(1, tile.stages - 1)


@dataclasses.dataclass(frozen=True)
class Found:
    """The fastest tile of one product, in microseconds beside the heuristic one's and, where it is cuBLAS, that of our
    kernels' best; no tile if none ran."""

    dtype: str
    m: int
    n: int
    k: int
    tile: Tile | None
    time: float = UNKNOWN
    heuristic: float = UNKNOWN
    own: float = UNKNOWN

    def row(self) -> Row | None:
        if self.tile is None:
            return None
        return Row(_kind(self.dtype), self.m if self.m < BUCKETS[-1] else None, self.n, self.k, self.tile)

    def __str__(self) -> str:
        product = f"{self.dtype}, M ≤ {self.m}, N = {self.n}, K = {self.k}"
        if self.tile is None:
            return f"{product}: no tile ran; left to the heuristic"
        cublas = f" (cuBLAS; our kernels {self.own:.1f} µs)" if self.tile.cublas else ""
        return f"{product}: {self.time:.1f} µs{cublas}, heuristic {self.heuristic:.1f} µs"


def _kind(dtype: str) -> str:
    return "int8" if dtype == "int8" else "fp8"


def proposals(
    shapes: Iterable[Shape], tokens: Sequence[int], dtypes: Sequence[str], target: Target
) -> Iterator[tuple[int, int, int, str, list[Tile]]]:
    """M, N, K, dtype of every product, with the tiles to try; shapes in order, for those who run out of time."""
    device = device_of(target)
    assert device is not None
    for n, k in dict.fromkeys(shapes):
        for m in sorted({bucket(m) for m in tokens}):
            for dtype in dtypes:
                yield m, n, k, dtype, candidates(m, n, k, _kind(dtype), device, target.name)


def kernels(proposed: Iterable[tuple[int, int, int, str, list[Tile]]]) -> list[tuple[int, int, str, Tile]]:
    """(N, K, dtype, tile) of which the compiled kernels differ, one of each."""
    found: dict[tuple[Any, ...], tuple[int, int, str, Tile]] = {}
    for _, n, k, dtype, tiles in proposed:
        for tile in tiles:
            sizes = n == 1, n % 16 == 0, k == 1, k % 16 == 0, k % tile.block_k == 0
            found.setdefault((*sizes, dtype, compiled_form(tile)), (n, k, dtype, tile))
    return list(found.values())


def search(
    shapes: Iterable[Shape], tokens: Sequence[int], dtypes: Sequence[str], target: Target, measure: Measure
) -> Iterator[Found]:
    """The fastest tile for every shape, number of tokens and dtype, one after the other."""
    for m, n, k, dtype, tiles in proposals(shapes, tokens, dtypes, target):
        times = measure(m, n, k, dtype, tiles)
        best = min(times, key=lambda tile: times[tile], default=None)
        if best is None:
            yield Found(dtype, m, n, k, None)
            continue
        own = min((tile for tile in times if not tile.cublas), key=lambda tile: times[tile], default=tiles[0])
        # What cuBLAS does not take, such as a residual, gets the best of ours.
        tile = dataclasses.replace(own, cublas=best.cublas)
        yield Found(dtype, m, n, k, tile, times[best], times.get(tiles[0], UNKNOWN), times.get(own, UNKNOWN))


def tune(
    shapes: Iterable[Shape],
    tokens: Sequence[int],
    dtype: str,
    target: Target,
    measure: Measure,
    told: Callable[[str], None] = lambda line: None,
) -> Table:
    """The table of the fastest tiles. Raises LoweringError if no tile runs at all."""
    rows = []
    for found in search(shapes, tokens, [dtype], target, measure):
        told(str(found))
        if row := found.row():
            rows.append(row)
    if not rows:
        raise LoweringError("tune must find a tile that runs; none did; see the lines above")
    return table_of(rows, target)


def table_of(rows: Iterable[Row], target: Target) -> Table:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    source = f"measured {today} with torch {torch.__version__}, Triton {_triton_version()}"
    return Table(target.name or str(target), source, tuple(rows))


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def two_rounds(
    tiles: Sequence[Tile], clock_of: Callable[[Tile], Clock | None], is_right: Callable[[Tile], bool]
) -> dict[Tile, float]:
    """Median microseconds of the leading tiles, and of the first one, which the others are compared with.

    Every tile is looked at briefly, the leading two in other groups too; then the best few that compute the right thing
    in turns, so that what disturbs one disturbs all. clock_of: None for a tile that does not run.
    """
    clocks: dict[Tile, Clock] = {}
    brief: dict[Tile, float] = {}

    def look(tile: Tile) -> None:
        if tile not in brief and (clock := clock_of(tile)) is not None:
            clocks[tile] = clock
            brief[tile] = statistics.median(clock() for _ in range(BRIEFLY))

    for tile in tiles:
        look(tile)
    for tile in sorted((tile for tile in brief if not tile.cublas), key=lambda tile: brief[tile])[:2]:
        for group in GROUPS:
            look(dataclasses.replace(tile, group=group))
    leading: list[Tile] = []
    for tile in sorted(brief, key=lambda tile: brief[tile]):
        if len(leading) < FINALISTS and is_right(tile):
            leading.append(tile)
    if tiles[0] in brief and tiles[0] not in leading and is_right(tiles[0]):
        leading.append(tiles[0])
    times: dict[Tile, list[float]] = {tile: [] for tile in leading}
    for _ in range(CAREFULLY):
        for tile in leading:
            times[tile].append(clocks[tile]())
    return {tile: statistics.median(looks) for tile, looks in times.items()}


class Bench:
    """This machine's GPU."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._cache = torch.cuda.get_device_properties().L2_cache_size
        self._weights: tuple[tuple[int, int, str], list[Tensor]] | None = None

    def compile_ahead(
        self, shapes: Iterable[Shape], tokens: Sequence[int], dtypes: Sequence[str], told: Callable[[str], None]
    ) -> None:
        """Compile every kernel that will be timed, on all cores; a launch then finds it in Triton's own cache.

        As a launch would, of operands like the launch's, but with memory of no content; a kernel that does not compile
        is found out again when it is timed.
        """
        wanted = kernels(proposals(shapes, tokens, dtypes, self._target))
        told(f"{len(wanted)} kernels to compile")
        compile_kernels(wanted, "cuda", os.cpu_count() or 1)

    def measure(self, m: int, n: int, k: int, dtype: str, tiles: Sequence[Tile]) -> dict[Tile, float]:
        """Microseconds of the leading tiles; operands are rotated through more memory than the cache holds."""
        sets = self._operands(m, n, k, dtype)
        pool = torch.cuda.graph_pool_handle()
        once: list[float] = []

        def clock_of(tile: Tile) -> Clock | None:
            if tile.cublas and not by_cublas(sets[0]):
                return None  # or it would be our kernel that is timed
            call = product(tile)
            calls = [functools.partial(call, operands) for operands in sets]
            try:
                calls[0]()  # compiles and loads
                torch.cuda.synchronize()  # where errors come up
                once.append(once[0] if once else gpu_timing.microseconds(calls, budget=0.0))
                return gpu_timing.clock_of(calls, once[0], pool)
            except Exception:  # out of shared memory or registers, or the compiler's own: another tile will do
                return None

        with torch._dynamo.config.patch(recompile_limit=10_000):
            return two_rounds(tiles, clock_of, lambda tile: is_right(product(tile)(sets[0]), sets[0]))

    def _operands(self, m: int, n: int, k: int, dtype: str) -> list[Operands]:
        if self._weights is None or self._weights[0] != (n, k, dtype):
            self._weights = None  # their memory first
            count = gpu_timing.copies(n * k, self._cache)
            self._weights = (n, k, dtype), [random(n, k, dtype, seed) for seed in range(count)]
        scales = torch.full((m,), 1e-2, device="cuda"), torch.full((n,), 1e-2, device="cuda")
        return [(random(m, k, dtype, 100 + seed), weight, *scales) for seed, weight in enumerate(self._weights[1])]
