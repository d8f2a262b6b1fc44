"""Timing of work on a GPU: captured in a CUDA graph, replayed, between device events, median. And the products that
`qcompile tune` and the benchmark time."""

import concurrent.futures
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile import ops
from qcompile.lowering.tiles import Tile
from qcompile.products import epilogue

Operands = tuple[Tensor, Tensor, Tensor, Tensor]  # x, weight and their scales
SHORTEST_REPLAY = 200.0  # microseconds: what a replay costs beside its work should not count
FEWEST, MOST = 7, 50


def microseconds(calls: Sequence[Callable[[], Any]], *, budget: float = 30_000.0) -> float:
    """Median time of one call, with the calls run in turn; several with operands of their own keep the cache cold.

    budget: microseconds of work to measure, at least. Needs a GPU; the calls must not wait for it.
    """
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    once = _replays(_captured(calls, 1), 3)
    repeat = max(1, round(SHORTEST_REPLAY / max(once, 1.0)))
    graph = _captured(calls, repeat)
    rounds = min(MOST, max(FEWEST, round(budget / max(once * repeat, 1.0))))
    return _replays(graph, rounds) / (repeat * len(calls))


def clock_of(calls: Sequence[Callable[[], Any]], once: float, pool: Any = None) -> Callable[[], float]:
    """A clock of calls that have run before: each look at it replays them once, and gives the microseconds of one.

    once: about how long one takes. pool: of memory that clocks share which never run at the same time.
    """
    repeat = max(1, round(SHORTEST_REPLAY / max(once * len(calls), 1.0)))
    graph = _captured(calls, repeat, pool)
    return lambda: _replays(graph, 1) / (repeat * len(calls))


def _captured(calls: Sequence[Callable[[], Any]], repeat: int, pool: Any = None) -> Any:
    """A graph of the calls, run once. Not by `torch.cuda.graph`, which gives all free memory back before it begins."""
    torch.cuda.synchronize()
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_side()):
        graph.capture_begin(*(() if pool is None else (pool,)))
        try:
            for _ in range(repeat):
                for call in calls:
                    call()
        finally:
            graph.capture_end()
    graph.replay()
    return graph


@functools.cache
def _side() -> Any:
    """The stream that everything is captured on, since memory is shared on one stream only."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def _replays(graph: Any, rounds: int) -> float:
    times: list[float] = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e3)
    return statistics.median(times)


def copies(size: int, cache: int) -> int:
    """How many sets of operands of `size` bytes overflow a cache twice, within reason."""
    return min(8, max(1, -(-2 * cache // max(1, size))))


def compiled_form(tile: Tile) -> Tile:
    """The tile with what its compiled kernel does not depend on left out: groups, parts by number, and cuBLAS, which
    has none."""
    return dataclasses.replace(tile, group=1, split=min(tile.split, 2), cublas=False)


def compile_kernels(cases: Iterable[tuple[int, int, str, Tile]], device: str, workers: int) -> None:
    """Compile the kernels of (N, K, dtype, tile) in threads: Triton's compiler is not Python for the most part."""
    import triton

    from qcompile.lowering import scaled_mm_kernel as kernel

    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for n, k, dtype, tile in cases:
            x, weight = (torch.empty(rows, k, dtype=ops.TORCH_DTYPES[dtype], device=device) for rows in (16, n))
            scales = torch.empty(16, device=device), torch.empty(n, device=device)
            operands = x, weight, *scales, None, None
            launched, _, grid, arguments, constants = kernel.launch_of(operands, "", torch.bfloat16, tile)
            launched.warmup(*arguments, grid=grid, **constants)


def random(rows: int, k: int, dtype: str, seed: int) -> Tensor:
    """An 8-bit operand on the GPU. Made as int8: integers of 64 bits would be eight times as large."""
    generator = torch.Generator("cuda").manual_seed(seed)
    if dtype == "int8":
        return torch.randint(-127, 128, (rows, k), generator=generator, device="cuda", dtype=torch.int8)
    wide = torch.randn(rows, k, generator=generator, device="cuda", dtype=torch.bfloat16)
    return wide.to(ops.TORCH_DTYPES[dtype])


def product(tile: Tile) -> Callable[[Operands], Tensor]:
    """One product as the backend launches it: x [M, K], weight [N, K] and scales → [M, N] of bfloat16.

    A split one with one kernel more, for the sum and the scales, which in a model are part of whatever comes next.
    """
    from qcompile.lowering import scaled_mm_cublas
    from qcompile.lowering import scaled_mm_kernel as kernel

    def call(operands: Operands) -> Tensor:
        if tile.cublas and by_cublas(operands):
            library: Tensor = scaled_mm_cublas.scaled_mm_op(*operands, None)
            return library
        everything = *operands, None, None
        launched, out, grid, arguments, constants = kernel.launch_of(everything, "", torch.bfloat16, tile)
        launched[grid](*arguments, **constants)
        return out if tile.split == 1 else finishing()(*operands[2:], *out.unbind())

    return call


def by_cublas(operands: Operands) -> bool:
    """Whether cuBLAS takes a product of these, in bfloat16."""
    from qcompile.lowering import scaled_mm_cublas

    x, weight, x_scale, _ = operands
    return not scaled_mm_cublas.takes(x, weight, x_scale, None, None, "", torch.bfloat16)


@functools.cache
def finishing() -> Callable[..., Tensor]:
    """Parts of a split product → the product; compiled once for each number of parts and dtype, for all sizes."""

    def finish(x_scale: Tensor, weight_scale: Tensor, *parts: Tensor) -> Tensor:
        sums = functools.reduce(torch.add, parts)
        return epilogue(sums, x_scale, weight_scale, None, None, None, torch.bfloat16)

    return torch.compile(finish, dynamic=True, fullgraph=True)


def is_right(y: Tensor, operands: Operands) -> bool:
    """A look at the corners, where a wrong mask would show, and the middle."""
    x, weight, x_scale, weight_scale = operands
    rows, columns = ([0, size // 2, size - 1] for size in y.shape)
    expected = _some(x, rows) @ _some(weight, columns).T
    expected *= x_scale[rows, None].to(torch.float64) * weight_scale[columns].to(torch.float64)
    error = (y[rows][:, columns].to(torch.float64) - expected).norm() / expected.norm().clamp(min=1e-30)
    return bool(error < 2e-2)


def _some(operand: Tensor, rows: list[int]) -> Tensor:
    """Rows in float64, picked as bytes: not every torch picks fp8."""
    return operand.view(torch.int8)[rows].view(operand.dtype).to(torch.float64)
