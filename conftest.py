"""One clear line instead of forty import errors when the package is not installed."""

import importlib.util

import pytest

if importlib.util.find_spec("qcompile") is None or importlib.util.find_spec("qcompile.passes") is None:
    raise pytest.UsageError("qcompile is not installed; run `make test`, or `pip install -e .` first")
