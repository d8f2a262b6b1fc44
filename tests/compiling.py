"""Running models through the backend, and an independent answer to compare them with."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tolerances import assert_close, row_for
from torch import Tensor, nn

FOLDER = Path(__file__).parent


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    """The model under the w8a8 backend; the lowered graph runs op by op unless options say otherwise."""
    return torch.compile(model.eval(), backend="w8a8", options={"inner": "eager", **options})


class ByHand(nn.Module):
    """A linear in int8 with per-token activations, written out with int64 sums."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        q, scale = _int8(x)
        weight_q, weight_scale = _int8(self.weight)
        y = (q.long() @ weight_q.long().T).float() * (scale[..., None] * weight_scale)
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.float().abs().amax(-1) / 127).clamp(min=1e-30)
    return (x.float() / scale[..., None]).round().clamp(-127, 127), scale


def by_hand(model: nn.Module) -> nn.Module:
    """A copy of the model, its weights as they are now, that computes what w8a8 without calibration should."""
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, ByHand(child))
    return model


def run_python(source: str, *arguments: str, cwd: Path | None = None, **environment: str) -> str:
    """What a new Python process printed, stdout and stderr together; the process must succeed."""
    path = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def run(call: Callable[..., Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return call(x)


def check(call: Callable[..., Tensor], model: nn.Module, x: Tensor) -> None:
    """The compiled call computes what W8A8 arithmetic on the live weights does, and not the float function."""
    actual = run(call, x)
    assert_close(row_for("rewrite", x.dtype), actual=actual, expected=run(by_hand(model), x))
    assert not torch.equal(actual, run(model, x))
