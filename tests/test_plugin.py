"""A process that asks for w8a8 and never reaches it is told so at exit."""

from pathlib import Path

import pytest
from compiling import run_python

PROGRAM = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
{}
"""
NEVER = "no graph reached it: everything ran in float"


def test_a_process_that_never_compiles_is_warned(tmp_path: Path) -> None:
    """As `torch.compile(model).generate(…)` does, this runs a method of the original model."""
    body = """
type(model).generate = lambda self, x: self(x)
fast = torch.compile(model, backend="w8a8")
with torch.no_grad():
    fast.generate(torch.randn(2, 16))
"""
    printed = run_python(PROGRAM.format(body), cwd=tmp_path)
    assert printed.count(NEVER) == 1
    assert "model.compile(backend='w8a8')" in printed


@pytest.mark.parametrize(
    "body",
    [
        """
with torch.no_grad():
    torch.compile(model, backend="w8a8", options={"inner": "eager"})(torch.randn(2, 16))
""",
        """
try:
    torch.compile(model, backend="w8a8", options={"alfa": 1})(torch.randn(2, 16))
except ValueError as error:
    print("refused:", error)
else:
    raise SystemExit("not refused")
""",
    ],
    ids=["runs", "refused"],
)
def test_others_are_not(body: str, tmp_path: Path) -> None:
    assert NEVER not in run_python(PROGRAM.format(body), cwd=tmp_path)
