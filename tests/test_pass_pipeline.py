"""Pipelines are values that print, parse, run on copies and name the pass that failed."""

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from graphs import ReluMLP, captured
from torch.fx import GraphModule

from qcompile import passes
from qcompile.config import Config
from qcompile.dump import graph_text
from qcompile.errors import ConfigError, PassError, WeightError
from qcompile.pass_pipeline import PassResult, Pipeline, Taken, pass_text
from qcompile.passes import PASSES, Canonicalize, FindLinears, QuantizeLinears, Smooth
from qcompile.rewrite import Refusal

TEXTS = [
    "",
    "canonicalize",
    "canonicalize,find_linears,smooth{alpha=0.8},quantize_linears",
    "smooth{alpha=0.0,absorb=False,edit=parameter}",
    "quantize_linears{dtype=fp8,activations=static}",
    "find_linears{ignore=()}",
    "find_linears{ignore=('lm_head', 'layers.0.*')}",
    "find_linears{ignore=('odd{braces}', '[ab]*', \"it's\", 'back\\\\slash')}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips(text: str) -> None:
    assert Pipeline.from_text(text, PASSES).to_text() == text


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(dtype="fp8", calibrate=1, alpha=0.7),
        Config(calibrate=1, activations="static", ignore=("a{b}",)),
    ],
    ids=["default", "fp8", "static"],
)
def test_values_round_trip(config: Config) -> None:
    for pipeline in (passes.quantizing(config), passes.observing(config)):
        assert Pipeline.from_text(pipeline.to_text(), PASSES) == pipeline


def test_defaults_are_left_out() -> None:
    assert pass_text(Smooth()) == "smooth"
    assert pass_text(Smooth(alpha=0.25)) == "smooth{alpha=0.25}"
    assert pass_text(QuantizeLinears("fp8_e5m2")) == "quantize_linears{dtype=fp8_e5m2}"


@pytest.mark.parametrize(
    "text",
    ["canonicalize find_linears", "smooth{", "smooth}", "{}", "]", "][", "]+[", "x for x in y", "smooth{0.5}",
     "canonicalize{3}", "smooth{*(1,)}", "\0"],
)  # fmt: skip
def test_text_that_is_no_pipeline(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Pipeline.from_text(text, PASSES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["smoth", "smoth{alpha=1}", "a.b", "1", "'smooth'"])
def test_an_unknown_pass_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="unknown pass .*; the passes are canonicalize, find_linears, "):
        Pipeline.from_text(text, PASSES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smooth{alfa=1}", "unknown option 'alfa' for pass smooth; its options are: absorb, activations, alpha"),
        ("canonicalize{x=1}", "unknown option 'x' for pass canonicalize; its options are: none"),
        ("smooth{alpha=1+x}", r"a pass option must be a literal; got '1 \+ x'"),
        ("smooth{alpha=f(1)}", r"a pass option must be a literal; got 'f\(1\)'"),
    ],
)
def test_a_bad_option_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pipeline.from_text(text, PASSES)


def test_passes_are_values() -> None:
    assert Smooth(0.3) == Smooth(alpha=0.3)
    assert len({Smooth(0.3), Smooth(0.3), Smooth(0.4)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Smooth().alpha = 1.0  # type: ignore[misc]


class Log:
    """Notes every call an observer gets."""

    def __init__(self, compares: bool) -> None:
        self.compares = compares
        self.calls: list[Any] = []

    def start(self, gm: GraphModule) -> None:
        self.calls.append(("start", graph_text(gm)))

    def step(self, taken: Taken) -> None:
        assert taken.seconds >= 0
        before = None if taken.before is None else graph_text(taken.before)
        self.calls.append((taken.index, taken.step.name, before, graph_text(taken.after), taken.result))


@pytest.mark.parametrize("compares", [True, False])
def test_observers_see_every_step(compares: bool) -> None:
    gm = captured(ReluMLP(), torch.randn(2, 16)).graph
    text, log = graph_text(gm), Log(compares)
    result, refusals = Pipeline((Canonicalize(), FindLinears(("fc1",)))).run(gm, [log])
    assert graph_text(gm) == text
    start, first, second = log.calls
    assert start == ("start", text)
    assert first[:2] == (0, "canonicalize")
    assert second[:2] == (1, "find_linears")
    assert first[2] == (text if compares else None)
    assert second[2] == (first[3] if compares else None)
    assert second[3] == graph_text(result)
    assert first[4].changes > 0
    assert refusals == second[4].refusals
    assert [refusal.reason for refusal in refusals] == ["fc1: its name matches an ignore pattern"]


def test_the_result_runs() -> None:
    graph = captured(ReluMLP(), torch.randn(2, 16))
    result, _ = Pipeline((Canonicalize(),)).run(graph.graph)
    with torch.no_grad():
        torch.testing.assert_close(result(*graph.args)[0], graph.graph(*graph.args)[0])


@dataclasses.dataclass(frozen=True)
class Fails:
    """Raises what it is told to."""

    kind: str = "KeyError"
    name: ClassVar[str] = "fails"
    stage: ClassVar[str] = "captured"
    bound: ClassVar[Any] = "exact"

    def run(self, gm: GraphModule) -> PassResult:
        raise {"KeyError": KeyError("lost"), "WeightError": WeightError("a weight")}[self.kind]


def test_a_pass_that_crashes_is_named() -> None:
    gm = captured(ReluMLP(), torch.randn(2, 16)).graph
    with pytest.raises(PassError, match="pass fails failed: KeyError: 'lost'") as caught:
        Pipeline((Canonicalize(), Fails())).run(gm)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_pass_that_refuses_on_purpose_is_heard() -> None:
    gm = captured(ReluMLP(), torch.randn(2, 16)).graph
    with pytest.raises(WeightError, match="^a weight$"):
        Pipeline((Fails("WeightError"),)).run(gm)


def test_every_pass_is_known_by_a_name_of_its_own() -> None:
    names = [kind.name for kind in PASSES]
    assert len(set(names)) == len(names)
    used = {type(step) for config in (Config(), Config(calibrate=1)) for step in passes.quantizing(config).passes}
    assert used | {type(step) for step in passes.observing(Config()).passes} == set(PASSES)


def test_refusals_are_values() -> None:
    assert PassResult(1, (Refusal("rule", "node", "reason"),)) == PassResult(1, (Refusal("rule", "node", "reason"),))
