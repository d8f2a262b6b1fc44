"""These tests run where Triton interprets its kernels, which it decides when it is imported: in a process of their own,
started by tests/lowering/test_scaled_mm_kernel.py."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="run by tests/lowering/test_scaled_mm_kernel.py"))
