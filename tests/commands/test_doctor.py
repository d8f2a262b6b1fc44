"""The doctor's report: every device and dtype, here and on machines that are not here."""

import json

import pytest
import torch

from qcompile import cli
from qcompile.commands import doctor
from qcompile.lowering.target import Target
from qcompile.ops import TORCH_DTYPES


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in found["versions"]["torch"]
    assert set(found["devices"][0]["dtypes"]) == set(TORCH_DTYPES)
    assert found["devices"][0]["dtypes"]["int8"]["runs"]
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "  int8: yes, kernel " in printed
    assert "for checking numbers" in printed


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
    found = doctor.describe(target, "x", "y")
    assert found["dtypes"][dtype]["runs"] is runs
    assert note in found["dtypes"][dtype]["note"]
    assert found["capability"] == (target.capability / 10 or None)


def test_a_gpu_that_is_not_here_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert cli.main(["doctor", "--target", "sm80"]) == 0
    printed = capsys.readouterr().out.partition("sm80: not in this machine, cuda (sm80)\n")[2].splitlines()
    assert printed[0] == "  int8: yes, kernel triton"
    assert printed[1].startswith("  fp8: no (fp8 needs compute capability 8.9")
    assert cli.main(["doctor", "--target", "h200"]) == 2


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.lowering.inductor.has_compiler", lambda: False)
    monkeypatch.setitem(doctor.OPTIONAL, "no_such_package", "something is missed")
    missing = doctor.report()["missing"]
    assert any("C++ compiler" in line for line in missing)
    assert "no_such_package: something is missed" in missing
    assert "missing: no_such_package: something is missed" in doctor._text(doctor.report())
