"""Random models through every pass, the whole pipeline, and lowering."""

import dataclasses
from typing import Any

import graphs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties.random_models import Model
from properties.random_specs import models
from properties.running import (
    OWN_ROUNDING,
    Statistic,
    assert_same_function,
    assert_same_layout,
    capture,
    no_statistic,
    run,
)
from tolerances import TOLERANCES
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from qcompile import passes
from qcompile.captured import Captured
from qcompile.config import Config
from qcompile.dump import graph_text
from qcompile.lowering.lower import lower
from qcompile.lowering.partition import partition
from qcompile.lowering.target import Target, detect
from qcompile.pass_pipeline import Pipeline
from qcompile.passes.find_linears import FindLinears, info_of
from qcompile.passes.quantize_linears import QuantizeLinears
from qcompile.rewrite import copy_graph
from qcompile.validate import Validate, graph_inputs, relative_error
from qcompile.verify import Verify

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TARGETS = st.sampled_from([detect(torch.device("cpu")), Target("cpu")])
CONFIGS = st.builds(
    Config,
    dtype=st.sampled_from(["int8", "int8", "fp8", "fp8_e5m2"]),
    activations=st.sampled_from(["token", "token", "tensor", "static"]),
    alpha=st.sampled_from([0.5, None, 0.8]),
    calibrate=st.just(1),
    ignore=st.just(()),
)
SOME = settings(max_examples=max(1, settings.default.max_examples // 2))
FEW = settings(max_examples=max(1, settings.default.max_examples // 6))


@SOME
@given(models(DTYPES, most_blocks=2), CONFIGS, TARGETS)
def test_every_pass_keeps_its_promise_and_lowering_computes_the_same(
    spec: Model, config: Config, target: Target
) -> None:
    captured = capture(spec)
    statistic = observed(captured, config)
    validate = Validate()
    quantized, _ = passes.quantizing(config).run(captured.graph, [Verify(full=True), validate])
    validate.check(captured.args, statistic)
    actual = run(quantized, captured, statistic)
    assert_same_layout(actual, run(captured.graph, captured, no_statistic))
    for left, right in zip(run_lowered(quantized, captured, statistic, target), actual, strict=True):
        assert torch.equal(left.nan_to_num(), right.nan_to_num())


@SOME
@given(models((torch.float32,), most_blocks=2), st.sampled_from(["token", "tensor"]), st.sampled_from([0.5, None, 0.8]))
def test_the_pipeline_computes_what_is_computed_by_hand(spec: Model, activations: Any, alpha: float | None) -> None:
    config = Config(activations=activations, alpha=alpha, calibrate=1, ignore=())
    captured = capture(spec)
    statistic = observed(captured, config)
    quantized, _ = passes.quantizing(config).run(captured.graph)
    actual = run(quantized, captured, statistic)
    smoothed, _ = before_quantization(config).run(captured.graph)
    inputs = graph_inputs(smoothed, captured.args, statistic)
    with torch.no_grad():
        expected = ByHand(smoothed, activations).run(*inputs)
        noisy = [ByHand(smoothed, activations, noise).run(*inputs) for noise in range(1, 4)]
    assert_same_function(spec, "rewrite", actual, expected)
    near_float(actual, run(captured.graph, captured, no_statistic), noisy)


def near_float(actual: list[Tensor], exact: list[Tensor], noisy: list[list[Tensor]]) -> None:
    """Within the row, or within a few times what noise of the size of the rounding does to this model."""
    row = TOLERANCES["int8/random model"]
    for index, (left, right) in enumerate(zip(actual, exact, strict=True)):
        noise = max(relative_error(outputs[index], right) for outputs in noisy)
        error, limit = relative_error(left, right), max(row.relative, OWN_ROUNDING * noise)
        assert error <= limit, f"error {error:.3e} > {limit:.1e}: {row.reason}"


@FEW
@given(models(DTYPES, most_blocks=2), CONFIGS)
def test_a_pass_run_again_changes_nothing(spec: Model, config: Config) -> None:
    captured = capture(spec)
    for pipeline in (passes.quantizing(config), passes.observing(config)):
        gm = copy_graph(captured.graph)
        for step in pipeline.passes:
            step.run(gm)
            once = graph_text(gm)
            again = step.run(gm)
            assert graph_text(gm) == once, step
            assert again.changes == 0, step


@FEW
@given(models(DTYPES, most_blocks=2), CONFIGS, st.integers(0, 2**16))
def test_what_is_folded_does_not_depend_on_values(spec: Model, config: Config, seed: int) -> None:
    pipeline = passes.quantizing(config)
    texts = [graph_text(pipeline.run(capture(s).graph)[0]) for s in (spec, dataclasses.replace(spec, seed=seed))]
    assert texts[0] == texts[1]


@FEW
@given(models(DTYPES, most_blocks=1), CONFIGS)
def test_without_linears_to_quantize_only_canonicalize_acts(spec: Model, config: Config) -> None:
    first, _, *others = passes.quantizing(config).passes
    gm = copy_graph(capture(spec).graph)
    first.run(gm)
    FindLinears(ignore=("*",)).run(gm)
    text = graph_text(gm)
    for step in others:
        assert step.run(gm).changes == 0, step
        assert graph_text(gm) == text, step


class NoLinear(nn.Module):
    """Nothing that any pass looks for, and shapes that some do."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(6))
        self.table = nn.Parameter(torch.rand(5, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(x.softmax(-1)) * self.gain
        return y.transpose(-1, -2).exp() + 1, y.amax(1).unsqueeze(1) + self.table


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_with_nothing_to_match_comes_back_as_it_was(dynamic: bool) -> None:
    captured = graphs.captured(NoLinear(), torch.randn(2, 5, 6), dynamic=dynamic)
    text = graph_text(captured.graph)
    for config in (Config(calibrate=1, ignore=()), Config(dtype="fp8", activations="static", calibrate=1)):
        for pipeline in (passes.quantizing(config), passes.observing(config)):
            assert graph_text(pipeline.run(captured.graph, [Verify(full=True)])[0]) == text


class Returned(nn.Module):
    """Everything is returned: siblings, views of them, and one cast twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.c = nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.norm(x)
        heads = self.a(h).view(*x.shape[:-1], 2, 2).transpose(1, 2)
        return heads, self.b(h), self.c(h) * 2, h.to(torch.float64), h.to(torch.float64)


@pytest.mark.parametrize("dynamic", [False, True])
def test_outputs_keep_their_layout_and_their_own_memory(dynamic: bool) -> None:
    captured = graphs.captured(Returned(), torch.randn(2, 5, 6), dynamic=dynamic)
    expected = run(captured.graph, captured, no_statistic)
    config = Config(calibrate=1, ignore=())
    quantized, _ = passes.quantizing(config).run(captured.graph, [Verify(full=True)])
    assert_same_layout(run(quantized, captured, observed(captured, config)), expected)


def observed(captured: Captured, config: Config) -> Statistic:
    """Statistics of the very input, as a calibration run records them, which leaves the outputs as they are."""
    gm, _ = passes.observing(config).run(captured.graph, [Verify(full=True)])
    results = run(gm, captured, no_statistic)
    groups = gm.meta["observed"]
    expected = run(captured.graph, captured, no_statistic)
    count = len(results) - 2 * len(groups)
    for left, right in zip(results[:count], expected, strict=True):
        torch.testing.assert_close(left, right)
    found: dict[int, Tensor] = {}
    for group, absmax in zip(groups, results[count::2], strict=True):
        for index in group:
            key = id(captured.args[index])
            found[key] = torch.maximum(found[key], absmax) if key in found else absmax
    return lambda weight, name, field: found[id(weight)]


def before_quantization(config: Config) -> Pipeline:
    steps = passes.quantizing(config).passes
    first = next(i for i, step in enumerate(steps) if isinstance(step, QuantizeLinears))
    return Pipeline(steps[:first])


class ByHand(Interpreter):
    """Runs a smoothed float graph with every chosen linear in int8, written out with int64 sums.

    With noise, operands are not rounded but moved at random within half a step: what quantization does to any model.
    """

    def __init__(self, gm: GraphModule, activations: str, noise: int = 0) -> None:
        super().__init__(gm)
        self.activations, self.noise = activations, noise
        self.generator = torch.Generator().manual_seed(noise)

    def run_node(self, n: Node) -> Any:
        if "linear" not in n.meta or n.target is not torch.ops.aten.linear.default or not info_of(n).quantize:
            return super().run_node(n)
        x, weight, bias = (self.env[arg] if isinstance(arg, Node) else None for arg in (*n.args, None)[:3])
        q, scale = self._int8(x, -1 if self.activations == "token" else tuple(range(x.ndim)))
        weight_q, weight_scale = self._int8(weight, -1)
        y = (q @ weight_q.T).float() * (scale * weight_scale.squeeze(-1))
        return y if bias is None else y + bias

    def _int8(self, x: Tensor, dims: Any) -> tuple[Tensor, Tensor]:
        scale = (x.abs().amax(dims, keepdim=True) / 127).clamp(min=1e-30)
        if self.noise:
            return (x / scale).double() + torch.rand(x.shape, generator=self.generator) - 0.5, scale
        return (x / scale).round().clamp(-127, 127).long(), scale


def run_lowered(quantized: GraphModule, captured: Captured, statistic: Statistic, target: Target) -> list[Tensor]:
    """Lowered without decompositions (those reorder float sums), partitioned, prepared, and run."""
    lowered, _ = lower(quantized, target, {})
    parts = partition(lowered)
    names = [node.name for node in lowered.graph.find_nodes(op="placeholder")]
    values = dict(zip(names, graph_inputs(lowered, captured.args, statistic), strict=True))
    with torch.no_grad():
        prepared = Interpreter(parts.prepare).run(*(values[node.name] for node in parts.prepare_inputs))
        return list(Interpreter(parts.run).run(*(captured.args[i] for i in parts.run_inputs), *prepared))
