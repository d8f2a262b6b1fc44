"""Tests that need an NVIDIA GPU: `make gpu` runs them; elsewhere they are skipped."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_gpu = torch.cuda.is_available() and torch.version.hip is None
    mine = [item for item in items if HERE in item.path.parents]
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    # What compiles models takes longest and goes first: it should not be what is left when others are done.
    mine.sort(key=lambda item: item.path.name != "test_compiled.py")
    items[:] = [item for item in items if HERE not in item.path.parents] + mine
