"""Reports of small models, made once."""

import functools
from typing import Any

import torch
from checkpoints import IDS, llama, quantized
from torch import Tensor, nn

import qcompile
from qcompile.reporting.report import Report

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>window[`hacked`]=1</script>",
    "<!--<script>",
    "層'\"&amp;`${1}",
    "line\nbreak",
)


@functools.cache
def report_of(layers: int = 1, device: str = "cpu", **options: Any) -> Report:
    """A tiny Llama's, calibrated on two batches; nothing is written."""
    model = llama(layers=layers)
    calibration = [IDS, IDS.flip(1)] if device == "cpu" else None
    return qcompile.report(model.to(device), None, calibration=calibration, name="tiny", **options)


@functools.cache
def quantized_report() -> Report:
    """The same Llama's, quantized before."""
    return qcompile.report(quantized(), None, against=llama(), windows=IDS)


class Hostile(nn.Module):
    """Linears one after the other under names that are markup."""

    def __init__(self) -> None:
        super().__init__()
        for name in HOSTILE:
            self.add_module(name, nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = torch.relu(module(x))
        return x


@functools.cache
def hostile_report() -> Report:
    """The report of `Hostile`, under a name to match."""
    torch.manual_seed(0)
    model, inputs = Hostile().eval().requires_grad_(False), {"x": torch.randn(4, 16)}
    return qcompile.report(model, None, calibration=[inputs], inputs=inputs, name=HOSTILE[1], ignore=())
