"""qcompile.report: what is in a report, for every kind of model."""

import re
from pathlib import Path

import pytest
import torch
from checkpoints import IDS, llama
from graphs import GatedMLP
from reporting.test_speed import ROOF, bench_file
from reports import quantized_report, report_of
from test_validate import Sabotaged, scale_weight
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

import qcompile
from qcompile import passes
from qcompile.config import Config
from qcompile.errors import CalibrationError, ConfigError, QCompileError
from qcompile.pass_pipeline import Pipeline


def test_every_pass_has_its_time_and_its_error() -> None:
    (run,) = report_of().data["graphs"]
    checks = {step["name"]: step["check"] for step in run["passes"]}
    assert checks["find_linears"] == {"same": True}
    assert 0 < checks["smooth"]["error"] < checks["smooth"]["limit"] == 2e-5
    assert 0 < checks["quantize_linears"]["error"] < checks["quantize_linears"]["limit"] == 1.0
    assert all(check is not None and "failed" not in check for check in checks.values())


def test_a_pass_that_leaves_its_bound_is_named_and_the_rest_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = passes.quantizing

    def quantizing(config: Config) -> Pipeline:
        steps = honest(config).passes
        return Pipeline(tuple(Sabotaged(step, scale_weight) if step.name == "smooth" else step for step in steps))

    monkeypatch.setattr(passes, "quantizing", quantizing)
    (run,) = qcompile.report(llama(), None, calibration=[IDS]).data["graphs"]
    checks = {step["name"]: step["check"] for step in run["passes"]}
    assert re.match(r"pass .* must be exact; an output or a written input changed by", checks["smooth"]["failed"])
    assert "error" in checks["quantize_linears"]


def test_a_model_without_weights_says_what_is_left_out() -> None:
    data = report_of(device="meta").data
    assert "no weights were read" in data["notes"][0]
    assert data["channels"] == {}
    assert data["groups"] == []
    assert [step["check"] for step in data["graphs"][0]["passes"]] == [None] * 9
    quantized = [entry for entry in data["linears"] if entry["kernel"]]
    assert {(entry["fate"], entry["sqnr"], tuple(entry["alphas"])) for entry in quantized} == {("folded", None, (0.5,))}
    assert data["layer"]["quantized"]["groups"]


def test_random_tokens_are_called_random() -> None:
    found = qcompile.report(llama(), None)
    assert any("random inputs" in note for note in found.data["notes"])
    assert len(found.data["channels"]) == 7
    assert not any("random" in note for note in report_of().data["notes"])


def test_channels_are_before_and_after() -> None:
    channels = report_of().data["channels"]["model.layers.0.self_attn.q_proj"]
    (x_before, x_after), (w_before, w_after) = channels["x"], channels["w"]
    assert channels["channels"] == len(x_before) == len(w_after) == 32
    assert max(x_before) > 5 * max(x_after)
    assert max(w_after) > max(w_before)


def test_quality_on_a_text() -> None:
    model = llama()
    data = qcompile.report(model, None, calibration=[IDS], windows=IDS).data
    figures = dict(data["quality"])
    with torch.no_grad():
        logits = model(input_ids=IDS).logits[:, :-1].reshape(-1, 64)
    expected = torch.nn.functional.cross_entropy(logits, IDS[:, 1:].reshape(-1))
    assert figures["float NLL"] == pytest.approx(float(expected), rel=1e-4)
    assert figures["tokens scored"] == 30
    assert 0 < figures["KL from float"] < 1e-2
    assert report_of().data["quality"] is None


def test_a_quantized_model_shows_its_record_and_its_distance_from_float() -> None:
    data = quantized_report().data
    summary = dict(data["summary"])
    assert (summary["dtype"], summary["activations"], summary["α"]) == ("int8", "token", "0.5")
    assert "quantized before" in data["notes"][0]
    assert dict(data["quality"])["top-1 agreement"] > 0.9


def test_speed_comes_from_a_file(tmp_path: Path) -> None:
    path = bench_file(tmp_path / "bench.json", roofline=ROOF)
    data = qcompile.report(llama().to("meta"), tmp_path / "r.html", bench=path).data
    assert data["speed"]["milliseconds"] == [[pytest.approx(8.0), pytest.approx(4.0)]]
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<td>8.00</td>" in text
    assert "inductor bf16" in text


def test_any_module_can_be_reported_with_its_inputs() -> None:
    inputs = {"x": torch.randn(4, 16)}
    found = qcompile.report(GatedMLP().requires_grad_(False), None, calibration=[inputs], inputs=inputs, alpha="auto")
    assert [entry["name"] for entry in found.data["linears"]] == ["gate_proj", "up_proj", "down_proj"]
    assert dict(found.data["summary"])["α"] == "auto"
    assert len(found.graphs) == 1


def test_pixels_and_encoders_are_made_up_too() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vit = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16)).eval().requires_grad_(False)
    assert len(qcompile.report(vit, None).data["channels"]) >= 6
    t5 = T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=50))
    data = qcompile.report(t5.eval().requires_grad_(False), None).data
    assert sum(entry["sqnr"] is not None for entry in data["linears"]) >= 10


def test_a_call_that_is_given_is_calibrated_on() -> None:
    data = qcompile.report(GatedMLP().requires_grad_(False), None, inputs={"x": torch.randn(4, 16)}).data
    assert data["notes"] == ["activations are those of the one call that was given"]
    assert len(data["channels"]) == 3


def test_a_call_without_a_graph_is_one_line() -> None:
    with pytest.raises(QCompileError, match="computes nothing|no linear"):
        qcompile.report(nn.Identity(), None, inputs={"input": torch.randn(2)}, calibration=[{"input": torch.randn(2)}])


def test_graphs_around_a_break_are_all_reported() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    inputs = {"x": torch.randn(4, 8)}
    data = qcompile.report(Broken().requires_grad_(False), None, calibration=[inputs], inputs=inputs).data
    assert len(data["graphs"]) == 2
    assert {entry["name"]: entry["link"][0] for entry in data["linears"]} == {"a": 0, "b": 1}


def test_a_calibration_of_another_model_leaves_a_note() -> None:
    torch.manual_seed(1)
    other = GatedMLP().requires_grad_(False)
    inputs = {"x": torch.randn(4, 16)}
    calibration = qcompile.calibrate(other, [inputs])
    data = qcompile.report(GatedMLP().requires_grad_(False), None, calibration=calibration, inputs=inputs).data
    assert any("does not belong to this model" in note for note in data["notes"])
    assert data["channels"] == {}


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown option 'bogus'"):
        qcompile.report(llama(), None, bogus=1)
    with pytest.raises(ConfigError, match="needs an example call; GatedMLP has no config; from Python, pass inputs=…"):
        qcompile.report(GatedMLP(), None)
    with pytest.raises(CalibrationError, match="needs at least one batch"):
        qcompile.report(llama(), None, calibration=[])
    with pytest.raises(ConfigError, match="cannot be written"):
        report_of().write(tmp_path / "nowhere" / "r.html")
