"""Smooth a small module with hostile statistics: what folded, why the rest did not, and did any output change?"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from graphs import InFloat64, captured
from tolerances import assert_close
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qcompile.captured import Captured
from qcompile.pass_pipeline import Taken
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears, info_of, linears
from qcompile.passes.smooth import Smooth
from qcompile.rewrite import Refusal, copy_graph, input_of
from qcompile.validate import graph_inputs
from qcompile.verify import Verify


class Body(nn.Module):
    """A forward written as a function of the module and its inputs, over the parts it is given."""

    def __init__(self, body: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


@dataclasses.dataclass(frozen=True)
class Probe:
    """A captured graph, its smoothed copy, and the reason for each linear that could not be folded whole, by name."""

    captured: Captured
    gm: GraphModule
    unfolded: dict[str, str]

    @property
    def folded(self) -> set[str]:
        return {info_of(node).name for node in linears(self.gm)} - set(self.unfolded)

    def assert_exact(self, captured: Captured | None = None) -> None:
        """Every output is what it was, in float64, on the captured arguments or on others."""
        subject = captured or self.captured
        expected, actual = run(self.captured.graph, subject), run(self.gm, subject)
        assert len(actual) == len(expected)
        for before, after in zip(expected, actual, strict=True):
            assert_close("smooth/float64", actual=after, expected=before)


def probe(
    model: nn.Module,
    *inputs: Tensor,
    dynamic: bool = False,
    absorb: bool = False,
    edit: Literal["use", "parameter"] = "use",
) -> Probe:
    """Capture a model and smooth its graph in float64."""
    return smoothed(captured(randomized(model), *inputs, dynamic=dynamic), Smooth(absorb=absorb, edit=edit))


def smoothed(subject: Captured, step: Smooth) -> Probe:
    """The captured graph after `step`; every pass's graph passes the full verifier."""
    gm = copy_graph(subject.graph)
    verify = Verify(full=True)
    verify.start(gm)
    refusals: tuple[Refusal, ...] = ()
    for index, one in enumerate((Canonicalize(), FindLinears(ignore=()), step)):
        result = one.run(gm)
        verify.step(Taken(index, one, None, gm, result, 0.0))
        refusals = result.refusals
    gm.recompile()
    return Probe(subject, gm, dict(refusal.reason.split(": ", 1) for refusal in refusals))


def randomized(model: nn.Module) -> nn.Module:
    """The model in float64, every parameter that is drawn constant (gains, biases) away from 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.double().parameters():
            if parameter.ndim < 2:
                parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) + 0.5)
    return model


def hostile(placeholder: Node) -> Tensor:
    """A statistic drawn log-uniform over 1e-3…1e3: any scale left out somewhere shows."""
    generator = torch.Generator().manual_seed(input_of(placeholder).of or 0)
    return 10 ** (torch.rand(placeholder.meta["val"].shape, generator=generator) * 6 - 3)


def run(gm: GraphModule, subject: Captured) -> list[Tensor]:
    """The graph's tensor outputs under hostile statistics, with the model's own casts to float32 kept in float64."""
    placeholders = [node for node in gm.graph.find_nodes(op="placeholder") if input_of(node).of is not None]
    statistics = {(input_of(node).name, input_of(node).field): node for node in placeholders}
    inputs = graph_inputs(gm, subject.args, lambda weight, name, field: hostile(statistics[name, field]))
    with torch.no_grad():
        return [value for value in InFloat64(gm).run(*inputs) if isinstance(value, Tensor)]


def error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative L2 error of any output."""
    return max(float((a - e).norm() / e.norm()) for a, e in zip(actual, expected, strict=True))
