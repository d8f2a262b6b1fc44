"""Observed graphs record what their linears read, and give their own results."""

import torch
from graphs import GatedMLP, captured

from qcompile import passes
from qcompile.calibration import Recorder
from qcompile.config import Config
from qcompile.observing import observe
from qcompile.rewrite import input_of


def test_results_are_the_models_and_ranges_are_recorded() -> None:
    model = GatedMLP()
    first = captured(model, torch.randn(3, 16))
    observed, _ = passes.observing(Config(calibrate=1)).run(first.graph)
    recorder = Recorder()
    args = list(first.args)
    with torch.no_grad():
        results = observe(observed, args, recorder)
        expected = first.graph(*first.args)
    assert args == []
    assert len(results) == len(expected)
    torch.testing.assert_close(results[0], expected[0])
    weights = [n for n in first.graph.graph.find_nodes(op="placeholder") if n.meta["val"].ndim == 2]
    parameters = [input_of(n) for n in weights if input_of(n).kind == "parameter"]
    for record in parameters:
        weight = first.args[record.index]
        assert recorder.calls(weight) == 1
        absmax = recorder.statistic(weight, record.name, "absmax")
        assert absmax.shape == (weight.shape[1],)
        assert float(absmax.max()) > 0
