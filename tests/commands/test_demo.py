"""qcompile demo: its options reach the work."""

from typing import Any

import pytest

from qcompile import cli, demonstration


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(demonstration, "run", lambda **options: calls.append(options))
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--windows", "3", "--dump", "x"]) == 0
    assert calls == [{"windows": 32, "dump": "qcompile_debug/demo"}, {"windows": 3, "dump": "x"}]
