"""What machines can run: this one, and some that are not here."""

import pytest

from qcompile import machine
from qcompile.lowering.target import Target


@pytest.mark.parametrize(
    ("target", "dtype", "runs", "note"),
    [
        (Target("cuda", 75), "fp8", False, "needs compute capability 8.9"),
        (Target("cuda", 90), "fp8", True, ""),
        (Target("cuda", 75), "int8", True, "triton: needs an NVIDIA GPU of compute capability 8.0"),
        (Target("cpu", 0, frozenset({"avx512_vnni"})), "int8", True, ""),
        (Target("cpu"), "int8", True, "needs VNNI"),
    ],
)
def test_other_machines(target: Target, dtype: str, runs: bool, note: str) -> None:
    found = machine.describe(target, "x", "y")
    assert found["dtypes"][dtype]["runs"] is runs
    assert note in found["dtypes"][dtype]["note"]
    assert found["capability"] == (target.capability / 10 or None)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.lowering.inductor.has_compiler", lambda: False)
    monkeypatch.setitem(machine.OPTIONAL, "no_such_package", "something is missed")
    missing = machine.report()["missing"]
    assert any("C++ compiler" in line for line in missing)
    assert "no_such_package: something is missed" in missing
