"""`qcompile quantize`, as a user runs it: what is written, and every mistake as one line, status 2, nothing left."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import TEXT, edit_json, float_folder, logits
from safetensors.torch import load_file, save_file

import qcompile
from qcompile import cli


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float_folder(tmp_path_factory.mktemp("source") / "m")


def run(source: Path, *options: str) -> int:
    text = ["--calibration", str(source.parent / "text.txt"), "--seqlen", "32", "--samples", "8", "--quality", "2"]
    return cli.main(["quantize", str(source), *text, *options])


def test_it_writes_a_folder_that_loads(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    status = run(source, "--out", str(out), "--alpha", "auto", "--activations", "static", "--dtype-load", "bfloat16")
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "in float: lm_head: its name matches an ignore pattern" in printed.out
    assert "top-1 agreement" in printed.out
    model = qcompile.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert logits(model).isfinite().all()
    assert "| held-out NLL, change |" in (out / "README.md").read_text()
    for file in ("README.md", "qcompile.json", "config.json"):  # the folder goes to others
        assert str(source.parent) not in (out / file).read_text()
    assert (out / "chat_template.jinja").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_json_and_lmdeploy(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(source, "--out", str(out), "--format", "lmdeploy", "--alpha", "none", "--quality", "0", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["alpha"] is None
    assert found["quality"] == {}
    assert found["tokens"] == 8 * 32
    assert found["peak_bytes"] > 0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "smooth_quant"


def broken(source: Path, tmp_path: Path) -> Path:
    """A copy of the source that may be damaged."""
    copy = tmp_path / "broken"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text.txt").write_bytes((source.parent / "text.txt").read_bytes())
    return copy


def drop_a_norm(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()


DAMAGE = {
    "not a model": (lambda f: (f / "config.json").unlink(), "must hold config.json"),
    "a tensor is missing": (drop_a_norm, "model.norm.weight is missing"),
    "pickles": (only_pickles, "pickle files"),
    "truncated": (truncated, "must be a whole safetensors file"),
    "no tokenizer": (no_tokenizer, "must hold a tokenizer"),
    "already quantized": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"}), "it is quantized already",
    ),
    "another shape": (lambda f: edit_json(f / "config.json", intermediate_size=64), "must have shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_models(source: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = broken(source, tmp_path)
    damage, reason = DAMAGE[name]
    damage(folder)
    assert run(folder, "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    assert error.startswith("qcompile: ")
    assert reason in error
    assert {path.name for path in tmp_path.iterdir()} == {"broken", "text.txt"}


MISTAKES = {
    "no such folder": (["--out", "out", "--alpha", "0.5"], "no such folder", "nowhere"),
    "alpha": (["--out", "out", "--alpha", "much"], "argument --alpha: must be a number in 0…1, auto", None),
    "alpha too large": (["--out", "out", "--alpha", "7"], "alpha must be", None),
    "batch size": (["--out", "out", "--batch-size", "0"], "argument --batch-size: must be", None),
    "quality": (["--out", "out", "--quality", "-1"], "argument --quality: must be", None),
    "too long": (["--out", "out", "--seqlen", "4096"], "must fit the model's 128 positions", None),
    "no such text": (["--out", "out", "--calibration", "./nothing.txt"], "there is no ./nothing.txt", None),
    "the output exists": (["--out", "exists"], "--overwrite", None),
    "the output cannot be": (["--out", "exists/file/out"], "cannot be written", "nowhere"),
    "the output is here": (["--out", ".", "--overwrite"], "holds the folder that you are in", "nowhere"),
    "everything ignored": (["--out", "out", "--ignore", "*"], "no linear", None),
    "e5m2 in compressed-tensors": (["--out", "out", "--dtype", "fp8_e5m2"], "tensors holds int8 and fp8", None),
    "static in lmdeploy": (
        ["--out", "out", "--format", "lmdeploy", "--activations", "static"], "holds no activation scales", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(
    source: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exists").mkdir()
    (tmp_path / "exists" / "file").write_text("mine")
    options, reason, model = MISTAKES[name]
    assert run(source if model is None else Path(model), *options) == 2
    error = capsys.readouterr().err.strip()
    assert reason in error.splitlines()[-1]
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["exists"]
    assert (tmp_path / "exists" / "file").read_text() == "mine"


@pytest.mark.parametrize("place", ["source", "."])
def test_the_model_stays(source: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(shutil.copytree(source, tmp_path / "source"))
    (tmp_path / "config.json").write_text("{}")
    before = {path: path.read_bytes() for path in model.iterdir()}
    assert run(model, "--out", str(tmp_path / place), "--overwrite") == 2
    assert f"{model}, which is read; choose another" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in model.iterdir()} == before


def test_fewer_windows_than_asked_for_are_told(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--out", str(tmp_path / "out"), "--calibration", str(tmp_path / "short.txt"), "--quality", "4"]
    (tmp_path / "short.txt").write_text(TEXT * 3)
    assert run(source, *options) == 0
    said = f"{tmp_path / 'short.txt'} fills 8 windows of 32 tokens; 6 of 8 are calibrated on, 2 of 4 held out"
    assert f"qcompile: {said}\n" in capsys.readouterr().err


def test_patterns_match_something(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert run(source, *out, "--ignore", "lm_head", "*.mlp.upproj") == 2
    assert "ignore must match linears; *.mlp.upproj matches none of LlamaForCausalLM" in capsys.readouterr().err
    assert run(source, *out, "--ignore", "lm_head", "*.mlp.up_proj", "embed_tokens", "--quality", "0") == 0
