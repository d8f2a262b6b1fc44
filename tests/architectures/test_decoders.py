"""A representative part of the coverage run (`make coverage-archs`): causal language models."""

import fnmatch

import pytest
from architectures import tiny
from architectures.expectations import DECODERS
from architectures.measure import EXACT, ForcedScales, calibrated, change, measure, outputs

from qcompile.capture import capture_call
from qcompile.captured import Captured
from qcompile.pass_pipeline import Pipeline
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears
from qcompile.passes.smooth import Smooth

pytestmark = pytest.mark.filterwarnings("ignore")  # of third parties, about models' code


@pytest.mark.parametrize("name", DECODERS)
def test_smoothing_covers_everything_and_changes_nothing(name: str) -> None:
    check(name, DECODERS[name])


def check(name: str, unfolded: list[str]) -> None:
    report = measure(name, errors=False)
    assert not report.cause
    assert report.finite
    assert report.calibrated <= EXACT
    assert report.adversarial <= EXACT
    assert report.in_place <= EXACT
    assert report.edits
    assert not report.loose
    assert not report.dead
    assert not report.kept
    assert report.macs.folded + report.macs.absorbed == pytest.approx(report.macs.quantized)
    for linear, reason in report.linears.items():
        assert bool(reason) == any(fnmatch.fnmatchcase(linear, pattern) for pattern in unfolded), (linear, reason)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_graph_for_all_sizes_is_exact_at_others_than_the_example(name: str) -> None:
    model = tiny.build(name)
    first, second = (
        capture_call(model, {"input_ids": tokens, "use_cache": False}, dynamic=True)
        for tokens in (tiny.example(name, model)["input_ids"], tiny.example(name, model)["input_ids"].repeat(3, 2))
    )
    (subject,), (other,) = first, second
    gm, _ = Pipeline((Canonicalize(), FindLinears(), Smooth())).run(subject.graph)
    elsewhere = Captured(subject.graph, other.args)
    expected = outputs(subject.graph, elsewhere, {})
    assert expected[0].shape[:2] == (3 * tiny.BATCH, 2 * tiny.TOKENS)
    assert change(ForcedScales(gm).outputs(elsewhere, calibrated(subject)), expected) <= EXACT
