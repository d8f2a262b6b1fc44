"""Smoothing alone changes nothing: random models, adversarial statistics, every dtype."""

import dataclasses

import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from properties.random_models import Model, build, example
from properties.random_specs import models
from properties.running import Statistic, adversarial, assert_same_function, capture, no_statistic, run
from torch import Tensor
from torch.fx import GraphModule

import qcompile
from qcompile import calibration, ops
from qcompile.captured import Captured
from qcompile.parameter_edits import ParameterEdits
from qcompile.pass_pipeline import Pipeline
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears
from qcompile.passes.smooth import Smooth
from qcompile.rewrite import args_of, input_of

# float16 reaches from 6e-5 to 65504: a weight scaled by 1e-3 from two sides would leave that range.
DECADES = {torch.float64: 3.0, torch.float32: 3.0, torch.bfloat16: 3.0, torch.float16: 1.0}
ALPHAS = st.sampled_from([0.5, 0.0, 0.25, 0.8, 1.0, "auto"])
NARROW = (torch.float32, torch.bfloat16, torch.float16)


STEPS = st.builds(Smooth, ALPHAS, power_of_two=st.sampled_from(["off", "off", "absorb", "drop"]))


# With the pipeline's, 200 random models in `make test`.
@settings(max_examples=max(110, settings.default.max_examples))
@given(models(), STEPS)
def test_smoothing_is_exact_in_float64(spec: Model, step: Smooth) -> None:
    check(spec, step)


@settings(max_examples=max(40, settings.default.max_examples))
@given(models(NARROW), STEPS)
def test_smoothing_only_rounds_in_narrow_dtypes(spec: Model, step: Smooth) -> None:
    check(spec, step)


@settings(max_examples=max(10, settings.default.max_examples // 3))
@given(models())
def test_smoothing_a_model_in_place_is_exact(spec: Model) -> None:
    captured = capture(spec)
    gm, _ = smoothed(captured, Smooth(absorb=False, edit="parameter"))
    if not folds(gm):
        return
    model, x = build(spec), example(spec)
    with torch.no_grad():
        expected = model(x)
        qcompile.smooth(model, recorded(spec, captured, gm), ignore=())
        actual = model(x)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), build(spec).parameters(), strict=True))
    assert_same_function(spec, "smooth", actual, expected)


def check(spec: Model, step: Smooth) -> None:
    """Smoothing by absorbing and folding, and by folding into parameters only, leaves the outputs as they are."""
    captured = capture(spec)
    expected = run(captured.graph, captured, no_statistic)
    gm, statistic = smoothed(captured, step)
    event("folds" if folds(gm) else "nothing to fold")
    assert_same_function(spec, "smooth", run(gm, captured, statistic), expected)
    gm, statistic = smoothed(captured, dataclasses.replace(step, absorb=False, edit="parameter"))
    event("folds into parameters" if folds(gm) else "nothing to fold into parameters")
    assert_same_function(spec, "smooth", run(gm, captured, statistic), expected)
    written = Captured(captured.graph, write_back(gm, captured, statistic))
    assert_same_function(spec, "smooth", run(captured.graph, written, no_statistic), expected)


def smoothed(captured: Captured, step: Smooth) -> tuple[GraphModule, Statistic]:
    gm, _ = Pipeline((Canonicalize(), FindLinears(ignore=()), step)).run(captured.graph)
    dtype = next(a.dtype for a in captured.args if isinstance(a, Tensor) and a.is_floating_point())
    return gm, adversarial(gm, seed=len(captured.args), decades=DECADES[dtype])


def folds(gm: GraphModule) -> int:
    """How many parameters take a factor."""
    edits = gm.graph.find_nodes(op="call_function", target=ops.rescale)
    return sum(args_of(edit)[0].op == "placeholder" for edit in edits)


def write_back(gm: GraphModule, captured: Captured, statistic: Statistic) -> list[object]:
    """The captured arguments with every scaled parameter at its new value, which the original graph can run on."""
    args = [arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in captured.args]
    edits = ParameterEdits(gm, args, statistic)
    edits.check()
    edits.write()
    return args


def recorded(spec: Model, captured: Captured, gm: GraphModule) -> calibration.Calibration:
    """A calibration file's content: adversarial statistics for the weights of this model."""
    statistic = adversarial(gm, spec.seed, DECADES[spec.dtype], unseen=0)
    found = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        record = input_of(node)
        if record.of is not None:
            weight = captured.args[record.of]
            absmax = statistic(weight, record.name, record.field)
            found[record.name] = calibration.Statistic(absmax, absmax[None], calibration.sample(weight))
    return calibration.Calibration(found, batches=1, tokens=1, example={"x": example(spec)})
