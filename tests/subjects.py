"""A small Llama whose logits depend on every linear, texts for it, and ways to spoil one linear or one pass."""

import dataclasses
import functools
from typing import Any, ClassVar

import torch
from checkpoints import IDS, llama
from torch import Tensor
from torch.fx import GraphModule

import qcompile
from qcompile.calibration import Calibration
from qcompile.config import Config
from qcompile.pass_pipeline import Bound, PassResult, Pipeline
from qcompile.passes import quantizing

WINDOWS = torch.randint(1, 60, (2, 24), generator=torch.Generator().manual_seed(7))
THRESHOLD = 0.02
aten = torch.ops.aten


@functools.cache
def subject() -> Any:
    """A float model that must not be changed. Two layers, 14 linears; sharp logits, as a trained model has."""
    model = llama(layers=2, tied=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter *= 4
            elif name.endswith("layernorm.weight"):
                parameter.fill_(1.0)  # the outliers alone are too much for static ranges
        model.lm_head.weight *= 8
    return model.requires_grad_(False)


@functools.cache
def calibration() -> Calibration:
    return qcompile.calibrate(subject(), [IDS, IDS.flip(1), *WINDOWS.split(1)])


def sabotaged(*names: str) -> Calibration:
    """The calibration with the activation ranges of some linears made 100 times too large."""
    statistics = dict(calibration().statistics)
    for name in names:
        known = statistics[f"{name}.weight"]
        statistics[f"{name}.weight"] = dataclasses.replace(known, absmax=known.absmax * 100)
    return dataclasses.replace(calibration(), statistics=statistics)


@dataclasses.dataclass(frozen=True)
class DropBias:
    """A pass that is wrong: it says it is exact, and one product loses a part of its result."""

    name: ClassVar[str] = "drop_bias"
    stage: ClassVar[str] = "any"
    bound: ClassVar[Bound] = "exact"

    def run(self, gm: GraphModule) -> PassResult:
        changed = 0
        for node in gm.graph.nodes:
            if node.target is aten.linear.default and len(node.args) > 2:
                node.args = node.args[:2]
                changed += 1
        return PassResult(changed)


def with_pass(config: Config, step: Any, after: str) -> Pipeline:
    """The backend's pipeline with one more pass."""
    steps = list(quantizing(config).passes)
    place = [one.name for one in steps].index(after) + 1
    return Pipeline((*steps[:place], step, *steps[place:]))


def perturbed(model: Any, name: str, factor: float) -> Any:
    """A stored linear whose input scale is off."""
    linear = model.get_submodule(name)
    linear.input_scale = torch.nn.Parameter(linear.input_scale * factor, requires_grad=False)
    return model


def ids() -> Tensor:
    return WINDOWS
