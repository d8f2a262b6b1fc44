"""The cache of compiled graphs, empty and listened to."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from caching import new_process
from torch._dynamo.utils import counters

from qcompile.saved_graph import cache as graph_cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of its own, switched on."""
    monkeypatch.setenv(graph_cache.SWITCH, "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters.clear()
    yield tmp_path / "qcompile"
    new_process()


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What the cache logged."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    graph_cache.log.addHandler(handler)
    graph_cache.log.setLevel(logging.INFO)
    yield lines
    graph_cache.log.removeHandler(handler)
    graph_cache.log.setLevel(logging.NOTSET)
