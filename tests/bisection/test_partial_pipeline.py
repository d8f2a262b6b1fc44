"""Variants of one traced graph: prefixes of the pipeline, and some linears quantized only."""

from typing import Any

import pytest
import torch
from graphs import GatedMLP, captured
from subjects import WINDOWS, calibration, subject

from qcompile import ops
from qcompile.bisection.partial_pipeline import PartialPipeline, QuantizeOnly
from qcompile.errors import ConfigError
from qcompile.pass_pipeline import Pipeline
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears, info_of, linears
from qcompile.passes.quantize_linears import QuantizeLinears

ARGUMENTS: dict[str, Any] = {"input_ids": WINDOWS[:1], "use_cache": False}


def logits(output: Any) -> torch.Tensor:
    found: torch.Tensor = output.logits
    return found


def test_only_chosen_linears_are_quantized() -> None:
    graph = captured(GatedMLP(), torch.randn(2, 16)).graph
    head = (Canonicalize(), FindLinears())
    found = [info_of(node).name for node in linears(Pipeline(head).run(graph)[0])]
    gm, _ = Pipeline((*head, QuantizeOnly((found[1],)), QuantizeLinears())).run(graph)
    assert len(gm.graph.find_nodes(op="call_function", target=ops.scaled_mm)) == 1
    assert [info_of(node).name for node in linears(gm)] == [found[0], *found[2:]]
    assert QuantizeOnly(tuple(found)).run(graph).changes == 0


def test_no_pass_is_float_and_every_step_is_the_backend() -> None:
    partial = PartialPipeline(subject(), None, {"calibration": calibration()})
    with torch.no_grad():
        expected = logits(subject()(**ARGUMENTS))
        torch.testing.assert_close(logits(partial.run_first(0, ARGUMENTS)), expected)
        assert len(partial.linears) == 14
        whole = logits(partial.run_first(len(partial.steps), ARGUMENTS))
        torch.testing.assert_close(logits(partial.run_only(partial.linears, ARGUMENTS)), whole)
        torch._dynamo.reset()
        options = {"calibration": calibration(), "inner": "eager"}
        backend = torch.compile(subject(), backend="w8a8", options=options, dynamic=False)
        torch.testing.assert_close(whole, logits(backend(**ARGUMENTS)))
        assert not torch.equal(whole, expected)


def test_the_last_step_is_the_lowering() -> None:
    partial = PartialPipeline(subject(), None, {})
    assert [text for text, _ in partial.steps][-2:] == ["eliminate_dead", "lower"]
    assert ("quantize_linears", False) in partial.steps
    assert ("canonicalize", True) in partial.steps


def test_a_pipeline_without_find_linears_has_no_linears() -> None:
    partial = PartialPipeline(subject(), Pipeline((Canonicalize(),)), {})
    partial.run_first(1, ARGUMENTS)
    assert partial.linears == ()


def test_calibrating_by_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="got calibrate"):
        PartialPipeline(subject(), None, {"calibrate": 2})
