"""Timing of work on a GPU: captured in a CUDA graph, replayed, between device events, median."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

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


def _captured(calls: Sequence[Callable[[], Any]], repeat: int) -> Any:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for call in calls:
                call()
    graph.replay()
    return graph


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
