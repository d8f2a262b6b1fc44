"""The doctor's report: every device and dtype, here and on machines that are not here."""

import json

import pytest
import torch

from qcompile import cli, machine
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


def test_a_gpu_that_is_not_here_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert cli.main(["doctor", "--target", "sm80"]) == 0
    printed = capsys.readouterr().out.partition("sm80: not in this machine, cuda (sm80)\n")[2].splitlines()
    assert printed[0] == "  int8: yes, kernel triton"
    assert printed[1].startswith("  fp8: no (fp8 needs compute capability 8.9")
    assert cli.main(["doctor", "--target", "h200"]) == 2


def test_what_is_missing_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(machine.OPTIONAL, "no_such_package", "something is missed")
    assert cli.main(["doctor"]) == 0
    assert "missing: no_such_package: something is missed" in capsys.readouterr().out
