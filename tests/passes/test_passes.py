"""The two pipelines, as text that a reader of the design would write down, and back."""

import dataclasses
from typing import Any

import pytest
import torch
from graphs import Attention, GatedMLP, captured, count
from torch import nn

from qcompile import ops
from qcompile.calibration import Calibration
from qcompile.config import Config
from qcompile.errors import ConfigError
from qcompile.pass_pipeline import Pipeline, pass_text
from qcompile.passes import PASSES, observing, quantizing
from qcompile.rewrite import input_of
from qcompile.validate import Validate
from qcompile.verify import STAGES, Verify

CALIBRATION = Calibration({}, 1, 1)
QUANTIZING = (
    "canonicalize,find_linears,quantize_linears,share_quantize,merge_siblings,fuse_epilogues,simplify_attention,"
    "eliminate_dead"
)
CONFIGS: dict[str, tuple[Config, str]] = {
    "defaults": (Config(), QUANTIZING),
    "calibrated": (Config(calibration=CALIBRATION), QUANTIZING.replace("quantize_l", "smooth,quantize_l")),
    "self-calibrating": (Config(calibrate=2), QUANTIZING.replace("quantize_l", "smooth,quantize_l")),
    "no smoothing": (Config(calibration=CALIBRATION, alpha=None), QUANTIZING),
    "alpha": (
        Config(calibration=CALIBRATION, alpha=0.75),
        QUANTIZING.replace("quantize_l", "smooth{alpha=0.75},quantize_l"),
    ),
    "alpha is an integer": (
        Config(calibration=CALIBRATION, alpha=1), QUANTIZING.replace("quantize_l", "smooth{alpha=1.0},quantize_l")
    ),
    "fp8, static": (
        Config(dtype="fp8", activations="static", calibration=CALIBRATION, alpha=None),
        QUANTIZING.replace("quantize_linears", "quantize_linears{dtype=fp8,activations=static}"),
    ),
    "ignore": (
        Config(ignore=("lm_head", "*.gate")),
        QUANTIZING.replace("find_linears", "find_linears{ignore=('lm_head', '*.gate')}"),
    ),
    "ignore nothing": (Config(ignore=()), QUANTIZING.replace("find_linears", "find_linears{ignore=()}")),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_the_quantizing_pipeline_reads_as_designed(name: str) -> None:
    config, text = CONFIGS[name]
    assert quantizing(config).to_text() == text


def test_the_observing_pipeline_reads_as_designed() -> None:
    assert observing(Config()).to_text() == "canonicalize,find_linears,insert_observers,eliminate_dead"
    assert observing(Config(ignore=("fc",))).to_text() == (
        "canonicalize,find_linears{ignore=('fc',)},insert_observers,eliminate_dead"
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_text_parses_back(name: str) -> None:
    for pipeline in (quantizing(CONFIGS[name][0]), observing(CONFIGS[name][0])):
        again = Pipeline.from_text(pipeline.to_text(), PASSES)
        assert again == pipeline
        assert again.to_text() == pipeline.to_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("canonicalise", "unknown pass 'canonicalise'; the passes are canonicalize, find_linears"),
        ("smooth{beta=1}", "unknown option 'beta' for pass smooth; its options are: absorb, activations, alpha"),
        ("canonicalize{}}", "a pipeline reads like"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pipeline.from_text(text, PASSES)


@pytest.mark.parametrize("kind", PASSES)
def test_every_pass_is_a_small_frozen_value(kind: Any) -> None:
    one = kind()
    assert dataclasses.is_dataclass(one)
    assert kind.__dataclass_params__.frozen
    assert one == kind()
    assert hash(one) == hash(kind())
    assert kind.name == pass_text(one) == kind.__module__.rpartition(".")[2]
    assert kind.stage in {*STAGES, "any"}
    assert kind.bound in ("exact", "quantization")
    assert kind.__doc__
    assert kind.__doc__.strip().endswith(".")


def test_only_quantizing_changes_numbers() -> None:
    assert [kind.name for kind in PASSES if kind.bound == "quantization"] == ["quantize_linears"]


def test_every_pass_is_used() -> None:
    config = Config(calibration=CALIBRATION)
    assert {type(step) for step in (*observing(config).passes, *quantizing(config).passes)} == set(PASSES)


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "symbolic"])
def test_a_model_goes_through_both_pipelines(dynamic: bool) -> None:
    """Verified and validated after every pass; the input graph stays as it was."""
    one = captured(nn.Sequential(Attention(), GatedMLP()), torch.randn(2, 5, 16), dynamic=dynamic)
    nodes = len(one.graph.graph.nodes)
    config = Config(calibration=CALIBRATION, ignore=("down_proj",))
    observed, refused = observing(config).run(one.graph, [Verify(full=True)])
    assert count(observed, ops.observe) == 3
    assert [refusal.reason for refusal in refused] == ["1.down_proj: its name matches an ignore pattern"]
    validate = Validate()
    gm, refused = quantizing(config).run(one.graph, [Verify(full=True), validate])
    assert len(refused) == 1
    assert count(gm, ops.scaled_mm) == 3
    assert count(gm, torch.ops.aten.linear.default) == 1
    sizes = {input_of(n).name: n.meta["val"].shape for n in gm.graph.find_nodes(op="placeholder") if input_of(n).of}
    checked = validate.check(one.args, lambda weight, name, field: torch.ones(sizes[name]))
    assert len(checked) >= 5
    assert len(one.graph.graph.nodes) == nodes
