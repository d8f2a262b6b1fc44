"""What becomes of a captured graph: passes → lowering → partition."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from qcompile import debug, ops, passes
from qcompile.capture import Around
from qcompile.config import Config
from qcompile.errors import ConfigError, LoweringError
from qcompile.grouped_ops import scaled_grouped_mm
from qcompile.lowering.inductor import decompositions
from qcompile.lowering.lower import lower
from qcompile.lowering.partition import Partition, partition
from qcompile.lowering.select import check_dtype
from qcompile.lowering.target import Target, detect
from qcompile.lowering.tiles import Table, load_measured
from qcompile.pass_pipeline import Observer, Pipeline
from qcompile.passes.find_linears import info_of, linears
from qcompile.rewrite import Refusal, fake_mode_of
from qcompile.validate import Validate


@dataclasses.dataclass(frozen=True)
class Stages:
    """A graph's forms after its passes. What a later process needs is kept on disk (qcompile/saved_graph/cache.py).

    observed: records what linears read; None unless the model calibrates itself. partition: the lowered graph; None if
    the session only observes. kernels: what each scaled_mm became. around: what a call needs around it; None if that is
    more than can be kept. guards: facts about symbolic sizes assumed before lowering.
    """

    observed: GraphModule | None = None
    partition: Partition | None = None
    kernels: dict[str, str] = dataclasses.field(default_factory=dict)
    around: Around | None = None
    quantized: GraphModule | None = None
    refusals: tuple[Refusal, ...] = ()
    guards: int = 0


def to_stages(
    config: Config, traced: GraphModule, *, observe_only: bool = False, validate: Validate | None = None
) -> Stages:
    """Run passes and lowering for the machine that the graph's inputs are on. Raises ConfigError, LoweringError."""
    if device_of(traced).type == "meta":
        raise LoweringError("a model must hold weights to run; this one is on the meta device; load them first")

    def run(pipeline: Pipeline) -> tuple[GraphModule, tuple[Refusal, ...]]:
        watching: list[Observer] = [*debug.observers(config, pipeline)]
        return pipeline.run(traced, [*watching, validate] if validate is not None else watching)

    observed, refusals = run(passes.observing(config)) if observe_only or config.calibrate else (None, ())
    if observe_only:
        return Stages(observed, refusals=refusals)
    quantized, refusals = run(passes.quantizing(config))
    _check_coverage(quantized, traced, refusals)
    target, guards = detect(device_of(quantized)), guards_of(quantized)
    check_dtype(target, config.torch_dtype)
    lowered, kernels = lower(quantized, target, decompositions(), tiles_of(config, target))
    around = traced.meta.get("around")
    return Stages(observed, partition(lowered), kernels, around, quantized, refusals, guards)


def tiles_of(config: Config, target: Target) -> Table | None:
    """What the user measured, if anything. Raises ConfigError."""
    return load_measured(config.tiles, target) if config.tiles else None


def device_of(gm: GraphModule) -> torch.device:
    """Of a graph's inputs: the first that is not the CPU, if there is one."""
    return first_device([node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")])


def first_device(values: Sequence[Any]) -> torch.device:
    """The same, of values."""
    devices = [value.device for value in values if isinstance(value, Tensor)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def guards_of(gm: GraphModule) -> int:
    """How many facts about symbolic sizes have been assumed so far."""
    shape_env = fake_mode_of(gm).shape_env
    return len(shape_env.guards) if shape_env is not None else 0


def _check_coverage(quantized: GraphModule, traced: GraphModule, refusals: Sequence[Refusal]) -> None:
    """A whole model in which nothing was quantized is a mistake; one graph of a broken-up model may be like that."""
    if any(node.target in (ops.scaled_mm, scaled_grouped_mm) for node in quantized.graph.nodes):
        return
    if not traced.meta.get("whole_model"):
        return
    left = {info_of(node).name: info_of(node).reason for node in linears(quantized)}
    if left:
        name, reason = next(iter(left.items()))
        raise ConfigError(f"no linear is left to quantize: {len(left)} stay in float, {name} because {reason}")
    if refusals:
        raise ConfigError(f"no linear is left to quantize: {refusals[0].reason}")
    raise ConfigError("the model has no linear layers; w8a8 has nothing to quantize; compile it with Inductor")
