"""Translation validation: run each pass's before and after graphs on real inputs and hold them to the pass's bound.

"exact" passes may differ by float rounding only. quantize_linears is held, linear by linear, to what its own scales
allow: with x̂ = x + dx and ŵ = w + dw, |y − ŷ| ≤ Σ|x||dw| + Σ|dx||w| + Σ|dx||dw| plus rounding, where |dx| and |dw| are
at most half a step (int8), half a unit in the last place (fp8), or what saturation cut off.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from qcompile import ops
from qcompile.calibration import StatisticOf, as_input
from qcompile.errors import VerifyError
from qcompile.grouped_ops import grouped_linear, scaled_grouped_mm
from qcompile.pass_pipeline import Pass, Taken, pass_text
from qcompile.rewrite import input_of

PRODUCTS = (ops.scaled_mm, scaled_grouped_mm)
# Relative L2 difference of outputs that reordered float arithmetic may cause over a whole model.
EXACT = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Half a unit in the last place, relative: e4m3 keeps 3 mantissa bits, e5m2 keeps 2.
HALF_ULP = {torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3}
SUBNORMAL = {torch.float8_e4m3fn: 2.0**-10, torch.float8_e5m2: 2.0**-17}


@dataclasses.dataclass(frozen=True)
class Checked:
    """One pass's numeric error on real inputs, and the limit it was held to. sqnr: of the linears it quantized, on what
    the quantized graph gives them to read, by name, in dB."""

    step: str
    error: float
    limit: float
    sqnr: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Validate:
    """Observer that keeps every pass's graphs until `check` gets real inputs."""

    compares = True

    def __init__(self) -> None:
        self._steps: list[tuple[Pass, GraphModule, GraphModule]] = []

    def start(self, gm: GraphModule) -> None:
        pass

    def step(self, taken: Taken) -> None:
        from qcompile.rewrite import copy_graph

        assert taken.before is not None
        if str(taken.before.graph) != str(taken.after.graph):  # not what the pass says of itself
            self._steps.append((taken.step, taken.before, copy_graph(taken.after)))

    def check(self, args: Sequence[Any], statistic: StatisticOf) -> list[Checked]:
        """Raises VerifyError naming the pass whose graph left its bound. `args` are not modified."""
        checked = []
        for _, outcome in self.outcomes(args, statistic):
            if isinstance(outcome, VerifyError):
                raise outcome
            checked.append(outcome)
        self._steps.clear()
        return checked

    def outcomes(self, args: Sequence[Any], statistic: StatisticOf) -> Iterator[tuple[str, Checked | VerifyError]]:
        """The same for every pass that changed its graph, by its text: a pass that failed does not end it."""
        for step, before, after in self._steps:
            checker = _check_quantization if step.bound == "quantization" else _check_exact
            try:
                with torch.no_grad():
                    checked = checker(pass_text(step), before, after, args, statistic)
            except VerifyError as error:
                yield pass_text(step), error
            else:
                yield pass_text(step), checked


def graph_inputs(gm: GraphModule, args: Sequence[Any], statistic: StatisticOf) -> list[Any]:
    """Values for a graph's placeholders from the captured arguments; tensors a graph may write are cloned."""
    inputs = []
    for node in gm.graph.find_nodes(op="placeholder"):
        record = input_of(node)
        if record.of is not None:
            weight = args[record.of]
            inputs.append(as_input(statistic(weight, record.name, record.field), weight))
        else:
            value = args[record.index]
            written = isinstance(value, Tensor) and record.kind == "activation"
            inputs.append(value.clone() if written else value)
    return inputs


def _check_exact(
    name: str, before: GraphModule, after: GraphModule, args: Sequence[Any], statistic: StatisticOf
) -> Checked:
    expected, actual = (_results(gm, args, statistic) for gm in (before, after))
    worst = Checked(name, 0.0, 0.0)
    for left, right in zip(expected, actual, strict=False):
        if isinstance(left, Tensor) and left.is_floating_point():
            error, limit = relative_error(right, left), EXACT[left.dtype]
            if not error <= limit:
                raise VerifyError(
                    f"pass {name} must be exact; an output or a written input changed by {error:.2e}, limit {limit:.0e}"
                )
            worst = max(worst, Checked(name, error, limit), key=lambda c: c.error)
    return worst


def _results(gm: GraphModule, args: Sequence[Any], statistic: StatisticOf) -> list[Any]:
    """The inputs a graph may write to, as it leaves them, and its outputs."""
    inputs = graph_inputs(gm, args, statistic)
    outputs = Interpreter(gm).run(*inputs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    writable = [v for v, node in zip(inputs, placeholders, strict=True) if input_of(node).kind == "activation"]
    return [*writable, *outputs]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; equal non-finite values (masks) do not count."""
    a, e = actual.double(), expected.double()
    same = (a == e) | (a.isnan() & e.isnan())
    difference = torch.where(same, 0.0, a - e)
    norm = torch.where(e.isfinite(), e, 0.0).norm()
    return float(difference.norm() / norm.clamp(min=1e-30)) if difference.numel() else 0.0


def _check_quantization(
    name: str, before: GraphModule, after: GraphModule, args: Sequence[Any], statistic: StatisticOf
) -> Checked:
    products = _Products(name, before, after)
    products.run(*graph_inputs(after, args, statistic))
    worst = 0.0
    sqnr: dict[str, float] = {}
    for product in _products(after):
        excess, error = products.excess(product)
        if not excess <= 1.0:
            raise VerifyError(
                f"pass {name} must keep {product.name} within the bound of its scales; "
                f"it is at {excess:.3g} times the bound"
            )
        worst = max(worst, excess)
        if "linear" in product.meta:
            linear = product.meta["linear"].name
            sqnr[linear] = min(sqnr.get(linear, math.inf), -20 * math.log10(max(error, 1e-15)))
    return Checked(name, worst, 1.0, sqnr)


def _products(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.target in PRODUCTS]


def _counterparts(name: str, before: GraphModule, after: GraphModule) -> dict[Node, Node]:
    """What stands for each node of the graph before: a product for a linear, the node itself for anything else."""
    now = {node.name: node for node in after.graph.nodes}
    now |= {node.meta["origin"].of: node for node in _products(after)}
    found: dict[Node, Node] = {}
    for node in before.graph.nodes:
        twin = found[node] = now.get(node.name, node)
        if twin.target not in PRODUCTS:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: found[n])
            if twin is node or (twin.target, twin.args, twin.kwargs) != (node.target, args, kwargs):
                raise VerifyError(f"pass {name} must leave everything but linears as it is; {node.name} changed")
    return found


def _times(offsets: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ; with offsets, each expert's rows by its own weight."""
    product: Tensor = x @ weight.T if offsets is None else grouped_linear(x, weight, offsets)
    return product


class _Products(Interpreter):
    """Runs a quantized graph and compares every product with the linear that it stands for."""

    def __init__(self, name: str, before: GraphModule, after: GraphModule) -> None:
        super().__init__(after, garbage_collect_values=False)
        self._name, self._now = name, _counterparts(name, before, after)
        self._before = {product: linear for linear, product in self._now.items()}

    def excess(self, product: Node) -> tuple[float, float]:
        """Its largest error as a share of the bound, and its relative L2 error, after `run`."""
        args: list[Any] = [self.env[arg] if isinstance(arg, Node) else arg for arg in product.args]
        x, x_error = self._original(product.args[0], args[0], args[2])
        w, w_error = self._original(product.args[1], args[1], args[3])
        self._check_operands(self._before[product], x, w, args[4])  # what follows: a bias, or the offsets of experts
        times = functools.partial(_times, args[4] if product.target is scaled_grouped_mm else None)
        y = times(x, w)
        limit = times(x.abs(), w_error) + times(x_error, w.abs()) + times(x_error, w_error)
        if product.target is ops.scaled_mm and args[4] is not None:
            y = y + args[4].double()
        rounding = (times(x.abs(), w.abs()) + y.abs()) * (torch.finfo(args[-1]).eps + x.shape[-1] * 2.0**-23)
        difference = (self.env[product].double() - y).abs()
        if not difference.numel():
            return 0.0, 0.0
        return float((difference / (limit + rounding).clamp(min=1e-30)).max()), relative_error(self.env[product], y)

    def _check_operands(self, linear: Node, *quantized: Tensor | None) -> None:
        """The bound is about what was quantized; that must be what the linear read."""
        operands = [self.env[self._now[arg]] for arg in linear.all_input_nodes]
        for value, kept in itertools.zip_longest(quantized, operands):
            if kept is None or value is None or not kept.is_floating_point():
                changed, limit = float(kept is not value), 0.0
            else:
                changed, limit = relative_error(value, kept), torch.finfo(kept.dtype).eps + 8 * 2.0**-24
            if not changed <= limit:
                raise VerifyError(
                    f"pass {self._name} must quantize what {linear.name} read; an operand changed by {changed:.2e}, "
                    f"limit {limit:.0e}"
                )

    def _original(self, node: Any, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The float values behind a quantized operand, and the largest error its scale allows, in float64."""
        quantize = node.args[0] if node.target not in (ops.quantize_static,) else node
        static = quantize.target is ops.quantize_static
        values = self.env[quantize.args[0]].double()
        for factor in quantize.args[2 if static else 1]:
            values = values * self.env[factor].double()
        step = scale.double().reshape(*scale.shape, 1) if scale.ndim else scale.double()
        largest = step * ops.QUANTIZED_MAX[q.dtype]
        if q.dtype == torch.int8:
            error = (step / 2).expand_as(values)
        else:
            error = torch.maximum(values.abs() * HALF_ULP[q.dtype], step * SUBNORMAL[q.dtype])
        return values, torch.maximum(error, values.abs() - largest)
