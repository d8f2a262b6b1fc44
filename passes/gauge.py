"""The gauge analysis: where can a per-channel scale move without changing what the model computes?

Every channel that a parameter could absorb (an entry of a gain or bias, a column or a row of a linear's weight) gets a
scale variable. One forward sweep over the graph carries labels: for each tensor, which variable multiplies each
element. Movement ops run on the labels themselves, linear algebra equates variables, and an op without a rule pins
what it reads to 1. What is still free at the end can be scaled at will, and the sweep has recorded every place that
must be compensated. No rule knows what a norm, a head or an expert is. docs/smoothing.md has the proof.

Soundness: (1) with x' = x · s[label] at every node, each rule in gauge_rules.py is an identity; (2) outputs and
everything without a rule see only unscaled values; (3) every use of a tensor adds its own constraint. A missing rule
costs a fold, never correctness.
"""

import dataclasses
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qcompile.passes.find_linears import parameters_in
from qcompile.passes.gauge_pins import pin_all
from qcompile.passes.gauge_rules import RULES, compares
from qcompile.passes.scale_variables import Labels, ScaleVariables, compact, ones
from qcompile.passes.symbolic_sizes import constant_factor
from qcompile.rewrite import input_of, is_float, shape_of, static_nodes, where

LARGEST_VARIABLE_ARRAY = 1 << 20  # larger static operands (masks, position tables) are not worth a variable each

Frozen = Callable[[Node], str]
Meaning = Tensor | list["Meaning"] | None


@dataclasses.dataclass(frozen=True)
class Use:
    """A static tensor T that absorbs scales where `user` reads it: T' = T · s[labels] / s[divided].

    Labels broadcast to its shape. divided: for matrices, whose rows or columns undo the scale of what they meet.
    """

    static: Node
    user: Node
    labels: Labels
    divided: Labels | None = None


@dataclasses.dataclass(frozen=True)
class LinearScales:
    """A linear y = x·Wᵀ + b: labels of its input channels [K] and of its output channels [N], which experts share.

    W' = W · s[outputs] / s[inputs], b' = b · s[outputs].
    """

    node: Node
    inputs: Labels
    outputs: Labels


class Sweep:
    """The state of one analysis, as the rules see it."""

    def __init__(self, gm: GraphModule, frozen: Frozen) -> None:
        self.variables = ScaleVariables()
        self.static = static_nodes(gm)
        self._gm = gm
        self.frozen = frozen
        self._uses: dict[tuple[Node, Node], Use] = {}
        self.linears: dict[Node, LinearScales] = {}
        self._labels: dict[Node, Meaning] = {}

    def run(self) -> None:
        for node in self._gm.graph.nodes:
            if node in self.static or node.op == "placeholder":
                continue
            self._labels[node] = self._meaning(node)

    def _meaning(self, node: Node) -> Meaning:
        rule = RULES.get(node.target, pin_all) if node.op == "call_function" else pin_all
        other = isinstance(node.meta.get("val"), Tensor) and not is_float(node) and rule is not compares
        if other or not all(map(_has_known_sizes, (node, *node.all_input_nodes))):
            rule = pin_all
        return self._for_all_sizes(node, rule(self, node), node.meta.get("val"))

    def _for_all_sizes(self, node: Node, meaning: Meaning, value: Any) -> Meaning:
        """A symbolic size is seen at its hint only: labels along it must repeat, or they could be others elsewhere."""
        if isinstance(meaning, list):
            return [self._for_all_sizes(node, *result) for result in zip(meaning, value, strict=True)]
        if not isinstance(meaning, Tensor):
            return meaning
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                meaning = self._repeat_along(meaning, dim, constant_factor(size), node)
        return meaning

    def _repeat_along(self, labels: Tensor, dim: int, period: int, node: Node) -> Tensor:
        """Equate labels that stand a multiple of `period` apart along a dimension."""
        if labels.stride(dim) == 0 or labels.shape[dim] <= 1:
            return labels
        (narrow,), shape = compact(labels)
        step = period if narrow.shape[dim] % period == 0 else 1
        parts = narrow.reshape(*narrow.shape[:dim], narrow.shape[dim] // step, step, *narrow.shape[dim + 1 :])
        first = self.unify_along(parts, [dim], node, "differs along a symbolic size")
        return first.expand(parts.shape).flatten(dim, dim + 1).expand(shape)

    def labels(self, node: Node) -> Tensor:
        """The labels of a tensor operand; graph inputs and static tensors are not scaled."""
        meaning = self._labels.get(node)
        return meaning if isinstance(meaning, Tensor) else ones(shape_of(node))

    def results(self, node: Node) -> Meaning:
        """What a node that returns a tuple has for each result."""
        return self._labels.get(node)

    def static_operand(self, static: Node, user: Node) -> Tensor:
        """Labels for a static tensor read elementwise: fresh variables, one per element.

        Only what is made from parameters absorbs scales: masks and tables may hold −inf, or serve many readers.
        """
        if (static, user) in self._uses:
            return torch.from_numpy(self._uses[static, user].labels)
        shape = shape_of(static)
        count = int(np.prod(shape, dtype=np.int64))
        trained = any(not input_of(parameter).buffer for parameter in parameters_in(static))
        if not trained or not is_float(static) or count > LARGEST_VARIABLE_ARRAY or count == 0:
            return ones(shape)
        variables = self.variables.fresh(count).reshape(shape)
        self.freeze(static, user, variables)
        self._uses[static, user] = Use(static, user, variables)
        return torch.from_numpy(variables)

    def matrices(self, static: Node, user: Node, inputs: Labels, outputs: Labels) -> None:
        """A batch of static matrices read by `user` undoes the scales of its inputs and makes those of its outputs."""
        for labels in (inputs, outputs):
            self.freeze(static, user, labels)
        self._uses[static, user] = Use(static, user, outputs, inputs)

    @property
    def uses(self) -> list[Use]:
        return list(self._uses.values())

    def freeze(self, static: Node, user: Node, variables: Labels) -> None:
        """Pin the variables of a static tensor that may not be edited."""
        if why := self.frozen(static):
            self.variables.pin(variables, f"{why}, read by {where(user)}")

    def constant(self, node: Node) -> Tensor:
        """The tensor behind a get_attr node."""
        value: Tensor = attrgetter(str(node.target))(self._gm)
        return value

    def why(self, what: str, node: Node) -> str:
        return f"{what}, {where(node)}"

    def any_free(self, labels: Tensor) -> bool:
        (narrow,), _ = compact(labels)
        return bool(self.variables.free(narrow.numpy()).any())

    def pin(self, labels: Tensor, node: Node, what: str) -> None:
        (narrow,), _ = compact(labels)
        self.variables.pin(narrow.numpy(), self.why(what, node))

    def unify(self, left: Tensor, right: Tensor, node: Node, what: str) -> None:
        (a, b), _ = compact(*torch.broadcast_tensors(left, right))  # type: ignore[no-untyped-call]
        self.variables.unify(a.numpy(), b.numpy(), self.why(what, node))

    def unify_along(self, labels: Tensor, dims: Iterable[int], node: Node, what: str) -> Tensor:
        """Equate labels along dimensions; returns them with those dimensions of size 1."""
        for dim in dims:
            if labels.shape[dim] == 0:
                return ones(tuple(1 if d in dims else n for d, n in enumerate(labels.shape)))
            if labels.stride(dim) == 0 or labels.shape[dim] == 1:
                labels = labels.narrow(dim, 0, 1)
                continue
            # The largest label speaks for its line: a zero (ANY) must not, and ONE pins whatever it meets.
            speaker = labels.amax(dim, keepdim=True)
            self.unify(speaker.expand(labels.shape), labels, node, what)
            labels = speaker
        return labels


def analyse(gm: GraphModule, frozen: Frozen = lambda static: "") -> Sweep:
    """Sweep a canonical graph. `frozen` names the reason why a static tensor may not be edited, or is empty."""
    sweep = Sweep(gm, frozen)
    sweep.run()
    return sweep


def _has_known_sizes(node: Node) -> bool:
    """Whether the sizes of a node's results, or the size that it is, had a value in the example: what data decides has
    none."""
    values = node.meta.get("val")
    for value in values if isinstance(values, list | tuple) else [values]:
        sizes = value.shape if isinstance(value, Tensor) else [value]
        if any(isinstance(size, torch.SymInt) and size.node.hint is None for size in sizes):
            return False
    return True
