"""Compile a model once more, as a new process would, and hear what the cache of compiled graphs did."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from qcompile import backend


def new_process() -> None:
    """Forget what was compiled, as a second process would not know it."""
    torch._dynamo.reset()
    backend._sessions.clear()


def events() -> dict[str, int]:
    """What the cache did since the last call."""
    found = {name.removeprefix("graph_cache_"): count for name, count in counters["qcompile"].items()}
    counters.clear()
    return found


def first_call(model: nn.Module, *args: Any, **options: Any) -> Any:
    new_process()
    compiled = torch.compile(model, backend="w8a8", options={"inner": "eager", **options}, dynamic=False)
    with torch.no_grad():
        return compiled(*args)


def entries(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.zip"))
