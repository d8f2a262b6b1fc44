"""Random models through every pass, the whole pipeline, and lowering."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties.random_models import Model, models
from properties.running import Statistic, capture, no_statistic, run
from tolerances import assert_close
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from qcompile import ops, passes
from qcompile.capture import Captured
from qcompile.config import Config
from qcompile.dump import graph_text
from qcompile.lowering.inductor import decompositions
from qcompile.lowering.lower import lower
from qcompile.lowering.partition import partition
from qcompile.lowering.target import Target, detect
from qcompile.passes.find_linears import info_of
from qcompile.passes.smooth import Smooth
from qcompile.pipeline import Pipeline
from qcompile.rewrite import copy_graph, input_of
from qcompile.validate import Validate, graph_inputs
from qcompile.verify import Verify

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CONFIGS = st.builds(
    Config,
    dtype=st.sampled_from(["int8", "int8", "fp8", "fp8_e5m2"]),
    activations=st.sampled_from(["token", "token", "tensor", "static"]),
    alpha=st.sampled_from([0.5, None, 0.8]),
    calibrate=st.just(1),
    ignore=st.just(()),
)
PLAIN = Target("cpu")


@given(models(DTYPES), CONFIGS)
def test_every_pass_keeps_its_promise_and_lowering_computes_the_same(spec: Model, config: Config) -> None:
    captured = capture(spec)
    statistic = observed(captured, config)
    validate = Validate()
    quantized, _ = passes.quantizing(config).run(captured.graph, [Verify(full=True), validate])
    validate.check(captured.args, statistic)
    idempotent(captured.graph, passes.quantizing(config))
    idempotent(captured.graph, passes.observing(config))
    actual = run(quantized, captured, statistic)
    lowered_alike(quantized, captured, statistic, actual)


def observed(captured: Captured, config: Config) -> Statistic:
    """Statistics of the very input, as a calibration run records them; its outputs are the float model's."""
    gm, _ = passes.observing(config).run(captured.graph, [Verify(full=True)])
    results = run(gm, captured, no_statistic)
    groups = gm.meta["observed"]
    expected = run(captured.graph, captured, no_statistic)
    for left, right in zip(results[: len(results) - len(groups)], expected, strict=True):
        torch.testing.assert_close(left, right)
    found: dict[int, Tensor] = {}
    for group, absmax in zip(groups, results[len(results) - len(groups) :], strict=True):
        for index in group:
            key = id(captured.args[index])
            found[key] = torch.maximum(found[key], absmax) if key in found else absmax
    return lambda weight, name: found[id(weight)]


def idempotent(graph: GraphModule, pipeline: Pipeline) -> None:
    gm = copy_graph(graph)
    for step in pipeline.passes:
        step.run(gm)
        once = graph_text(gm)
        again = step.run(gm)
        assert graph_text(gm) == once, step
        assert again.changes == 0, step


def lowered_alike(quantized: GraphModule, captured: Captured, statistic: Statistic, expected: list[Tensor]) -> None:
    for target in (detect(torch.device("cpu")), PLAIN):
        for left, right in zip(run_lowered(quantized, captured, statistic, target, {}), expected, strict=True):
            assert torch.equal(left, right)


def run_lowered(
    quantized: GraphModule, captured: Captured, statistic: Statistic, target: Target, table: dict[Any, Any]
) -> list[Tensor]:
    lowered, _ = lower(quantized, target, table)
    parts = partition(lowered)
    values = dict(zip(lowered.graph.find_nodes(op="placeholder"), graph_inputs(lowered, captured.args, statistic), strict=True))
    with torch.no_grad():
        prepared = Interpreter(parts.prepare).run(*(values[node] for node in parts.prepare_inputs))
        return list(Interpreter(parts.run).run(*(captured.args[i] for i in parts.run_inputs), *prepared))
