"""Real weights and text, through the compiled backend: the project's accuracy promises on a shortened text.

Needs the folder shared/data beside the checkout; scripts/measure_quality.py measures the whole text.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import InFloat64

import qcompile
from qcompile.capture import capture_call
from qcompile.outliers import inject_outliers
from qcompile.pass_pipeline import Pipeline
from qcompile.passes import Canonicalize, FindLinears, Smooth
from qcompile.quality.likelihood import score, token_windows
from qcompile.validate import graph_inputs, relative_error

DATA = Path(__file__).parents[2].parent / "shared" / "data"
WINDOW, BATCH, WINDOWS = 256, 16, 48

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs real models and texts in ../shared/data")


@pytest.fixture(scope="module", params=["stories260K", "babyllama361"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[False, True], ids=["as trained", "outliers injected"])
def setting(name: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "models" / name)
    model = AutoModelForCausalLM.from_pretrained(DATA / "models" / name, dtype=torch.float32).eval()
    if request.param:
        inject_outliers(model)
    text = (DATA / "text" / "tinystories_valid.txt").read_text(encoding="utf-8")[:200_000]
    data = (DATA / "text" / "tinystories_train_sample.txt").read_text(encoding="utf-8")
    windows = token_windows(tokenizer, text, WINDOW, limit=WINDOWS)
    calibration = qcompile.calibrate(model, list(torch.split(token_windows(tokenizer, data, WINDOW, limit=64), 16)))
    return {
        "model": model,
        "windows": windows,
        "calibration": calibration,
        "injected": request.param,
        "base": score(model, windows, BATCH).nll,
    }


def change(setting: dict[str, Any], **options: Any) -> float:
    torch._dynamo.reset()
    compiled = torch.compile(setting["model"], backend="w8a8", options={"inner": "eager", **options}, dynamic=False)
    return score(compiled, setting["windows"], BATCH).nll - setting["base"]


def test_per_token_with_smoothing_keeps_the_quality(setting: dict[str, Any]) -> None:
    limit = 0.005 if setting["injected"] else 0.003
    assert change(setting, calibration=setting["calibration"], alpha=0.5) <= limit


def test_outliers_break_unsmoothed_quantization(setting: dict[str, Any]) -> None:
    difference = change(setting)
    assert difference > 0.1 if setting["injected"] else abs(difference) <= 0.01


def test_static_activations_with_smoothing(setting: dict[str, Any]) -> None:
    assert change(setting, calibration=setting["calibration"], alpha=0.5, activations="static") <= 0.02


def test_smoothing_alone_is_exact_in_float64(setting: dict[str, Any]) -> None:
    import copy

    model = copy.deepcopy(setting["model"]).double()
    (captured,) = capture_call(model, {"input_ids": setting["windows"][:2], "use_cache": False})
    smoothed, _ = Pipeline((Canonicalize(), FindLinears(), Smooth(0.5))).run(captured.graph)
    with torch.no_grad():
        expected, actual = (
            InFloat64(graph).run(*graph_inputs(graph, captured.args, setting["calibration"].statistic))[0]
            for graph in (captured.graph, smoothed)
        )
    assert smoothed.graph != captured.graph
    assert relative_error(actual, expected) <= 1e-10


def test_smoothing_in_place_changes_nothing_but_rounding(setting: dict[str, Any]) -> None:
    import copy

    model = copy.deepcopy(setting["model"])
    ids = setting["windows"][:4]
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        qcompile.smooth(model, setting["calibration"], alpha=0.5)
        after = model(input_ids=ids, use_cache=False).logits
    assert float((after - before).norm() / before.norm()) <= 2e-6
    changed = sum(
        bool((new != old).any()) for new, old in zip(model.parameters(), setting["model"].parameters(), strict=True)
    )
    assert changed >= 8 * len(model.model.layers)
