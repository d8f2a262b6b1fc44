"""Timing on a GPU: the arithmetic around the clock. The clock itself runs in tests/gpu."""

import pytest

from qcompile.bench import gpu_timing
from qcompile.bench.gpu_timing import copies, microseconds


@pytest.mark.parametrize(
    ("size", "cache", "expected"),
    [(1, 60, 8), (16, 60, 8), (30, 60, 4), (60, 60, 2), (119, 60, 2), (120, 60, 1), (1000, 60, 1), (0, 60, 8)],
)
def test_operands_overflow_the_cache_twice(size: int, cache: int, expected: int) -> None:
    assert copies(size, cache) == expected


@pytest.mark.parametrize("each", [2.0, 40.0, 5000.0])
@pytest.mark.parametrize("count", [1, 4])
def test_a_calls_share_of_a_replay(each: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay takes the time of its calls: whatever is captured, one call's time comes out."""

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: object) -> None:
            pass

    replays: list[tuple[float, int]] = []
    monkeypatch.setattr(gpu_timing.torch.cuda, "Stream", Stream)
    monkeypatch.setattr(gpu_timing.torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(gpu_timing.torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(gpu_timing, "_captured", lambda calls, repeat: each * len(calls) * repeat)

    def timed(graph: float, rounds: int) -> float:
        replays.append((graph, rounds))
        return graph

    monkeypatch.setattr(gpu_timing, "_replays", timed)
    called: list[int] = []
    found = microseconds([lambda i=i: called.append(i) for i in range(count)])  # type: ignore[misc]
    assert found == pytest.approx(each)
    assert sorted(set(called)) == list(range(count))
    graph, rounds = replays[-1]
    assert graph >= gpu_timing.SHORTEST_REPLAY * 0.7
    assert gpu_timing.FEWEST <= rounds <= gpu_timing.MOST
