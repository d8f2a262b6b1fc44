"""Capturing random models, running their graphs, and how exact the results can be."""

from collections.abc import Callable

import graphs
import torch
from properties.random_models import Model, build, example
from tolerances import TOLERANCES, row_for
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from qcompile.captured import Captured
from qcompile.rewrite import input_of
from qcompile.validate import graph_inputs, relative_error

Statistic = Callable[[Tensor, str, str], Tensor]
# A model that rounds more than its row says (a norm over two nearly equal channels, say) is allowed so many times
# the error that its own dtype makes: measured against the same parameters in float64, or what its outputs move by when
# every parameter is rounded once more, whichever is larger. (One rounding alone may happen to cancel.)
OWN_ROUNDING = 4
ROUNDED = 4  # how often parameters are rounded at random to measure that


def capture(spec: Model) -> Captured:
    """The specification's graph, and its arguments."""
    torch._dynamo.reset()
    return graphs.captured(build(spec), example(spec), dynamic=spec.dynamic)


def run(gm: GraphModule, captured: Captured, statistic: Statistic) -> list[Tensor]:
    with torch.no_grad():
        return list(Interpreter(gm).run(*graph_inputs(gm, captured.args, statistic)))


def no_statistic(weight: Tensor, name: str, field: str) -> Tensor:
    raise AssertionError("a float graph needs no statistics")


def adversarial(gm: GraphModule, seed: int, decades: float, unseen: float = 1 / 8) -> Statistic:
    """absmax (and rows) log-uniform in 10^±decades per channel; a share is zero: channels calibration never saw."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        if input_of(node).kind == "statistic":
            exponent = (torch.rand(tuple(node.meta["val"].shape), generator=generator) * 2 - 1) * decades
            seen = torch.rand(exponent.shape, generator=generator) >= unseen
            values[input_of(node).name, input_of(node).field] = 10**exponent * seen
    return lambda weight, name, field: values[name, field]


def assert_same_layout(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Outputs keep their strides, and share memory only where they did: callers view them, and write to them."""
    for left, right in zip(actual, expected, strict=True):
        assert strides(left) == strides(right)
    assert sharing(actual) == sharing(expected)


def strides(x: Tensor) -> list[int]:
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def sharing(tensors: list[Tensor]) -> list[int]:
    """For each tensor, the first that lives in the same storage."""
    addresses = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    return [addresses.index(address) for address in addresses]


def own_rounding(spec: Model, outputs: list[Tensor]) -> list[float]:
    """How far each output of the model is from the same parameters and input in float64."""
    with torch.no_grad():
        precise = build(spec, torch.float64)(example(spec, torch.float64))
    return [relative_error(output, exact) for output, exact in zip(outputs, distinct(precise), strict=True)]


def sensitivity(spec: Model, outputs: list[Tensor]) -> list[float]:
    """How far each output moves, at most, when every parameter is off by up to one rounding of the spec's dtype."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.finfo(spec.dtype).eps / 2
    moved = [0.0] * len(outputs)
    with torch.no_grad():
        precise = distinct(build(spec, torch.float64)(example(spec, torch.float64)))
        for _ in range(ROUNDED):
            model = build(spec, torch.float64)
            for parameter in model.parameters():
                step = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
                parameter.mul_(1 + unit * step)
            off = distinct(model(example(spec, torch.float64)))
            moved = [max(m, relative_error(a, b)) for m, a, b in zip(moved, off, precise, strict=True)]
    return moved


def distinct(outputs: list[Tensor]) -> list[Tensor]:
    """Without repetitions: a graph returns one tensor once."""
    return list({id(output): output for output in outputs}.values())


def assert_same_function(spec: Model, kind: str, actual: list[Tensor], expected: list[Tensor]) -> None:
    """Every output within the row "kind/dtype", or within a few times what the model itself rounds."""
    row = TOLERANCES[row_for(kind, spec.dtype)]
    noise = [0.0] * len(expected) if spec.dtype == torch.float64 else own_rounding(spec, expected)
    assert len(actual) == len(expected)
    for index, (left, right, own) in enumerate(zip(actual, expected, noise, strict=True)):
        assert left.shape == right.shape
        assert left.dtype == right.dtype
        error = relative_error(left, right)
        limit = max(row.relative, OWN_ROUNDING * own)
        if error > limit and spec.dtype != torch.float64:
            limit = max(limit, OWN_ROUNDING * sensitivity(spec, expected)[index])
        assert error <= limit, f"error {error:.3e} > {limit:.1e}, row {row_for(kind, spec.dtype)}: {row.reason}"
