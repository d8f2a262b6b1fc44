"""Loading: other tools' folders, ours saved again, and every way in which a folder can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_json, float_folder, llama, logits, quantized
from safetensors.torch import load_file, save_file

import qcompile
from qcompile.checkpoint.fake_quantized import fake_quantized
from qcompile.checkpoint.folder import CONFIG, RECORD, WEIGHTS, read_json
from qcompile.checkpoint.loading import load_float, load_tokenizer, resolve
from qcompile.errors import CheckpointError, ConfigError
from qcompile.quantized_linear import quantized_linears

BOTH = ("weights", "input_activations")
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A static int8 folder without digests, so that changes get as far as they can."""
    qcompile.save_pretrained(quantized(activations="static"), tmp_path / "m")
    (tmp_path / "m" / RECORD).unlink()
    return tmp_path / "m"


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def reconfigure(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    values = read_json(folder / CONFIG)
    edit(values["quantization_config"])
    (folder / CONFIG).write_text(json.dumps(values))


def halve(t: dict[str, torch.Tensor]) -> None:
    t[f"{Q}.weight"] = t[f"{Q}.weight"][:, :16].contiguous()


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a scale is missing": (lambda f: change(f, lambda t: t.pop(f"{Q}.weight_scale")), "q_proj.weight_scale is missing"),
    "a weight is missing": (lambda f: change(f, lambda t: t.pop(f"{Q}.weight")), "q_proj.weight is missing"),
    "an input scale is missing": (lambda f: change(f, lambda t: t.pop(f"{Q}.input_scale")), "input_scale is missing"),
    "a norm is missing": (lambda f: change(f, lambda t: t.pop("model.norm.weight")), "model.norm.weight is missing"),
    "a tensor is left over": (
        lambda f: change(f, lambda t: t.update({f"{Q}.weight_zero_point": torch.zeros(32, 1, dtype=torch.int8)})),
        "weight_zero_point has no place",
    ),
    "another shape": (lambda f: change(f, halve), r"must have shape \[32, 32\]"),
    "a float weight": (
        lambda f: change(f, lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float()})), "must be torch.int8",
    ),
    "another 8-bit weight": (
        lambda f: change(f, lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float().to(torch.float8_e4m3fn)})),
        "must be torch.int8",
    ),
    "an integer scale": (
        lambda f: change(f, lambda t: t.update({f"{Q}.weight_scale": torch.ones(32, 1, dtype=torch.int32)})),
        "must be floating point",
    ),
    "a scale of zero": (lambda f: change(f, lambda t: t[f"{Q}.weight_scale"][3].zero_()), "finite and positive"),
    "a scale of NaN": (
        lambda f: change(f, lambda t: t[f"{Q}.input_scale"].fill_(float("nan"))), "finite and positive",
    ),
    "scales in a row": (
        lambda f: change(f, lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"].reshape(1, -1)})),
        r"must have shape \[32, 1\]",
    ),
    "an unknown method": (lambda f: reconfigure(f, lambda q: q.update(quant_method="gptq")), "got 'gptq'"),
    "a head that is not ignored": (lambda f: reconfigure(f, lambda q: q.update(ignore=[])), "lm_head"),
    "an ignored linear": (lambda f: reconfigure(f, lambda q: q["ignore"].append(Q)), "must be floating point"),
    "targets that are not there": (
        lambda f: reconfigure(f, lambda q: q["config_groups"]["group_0"].update(targets=["Conv3d"])),
        "none of its targets",
    ),
    "another dtype": (
        lambda f: reconfigure(f, lambda q: [q["config_groups"]["group_0"][k].update(type="float") for k in BOTH]),
        "must be torch.float8_e4m3fn",
    ),
    "a larger vocabulary": (lambda f: edit_json(f / CONFIG, vocab_size=10**12), "must have shape"),
    "another width": (lambda f: edit_json(f / CONFIG, hidden_size=64, head_dim=8), "must have shape"),
    "fewer layers than there are": (lambda f: edit_json(f / CONFIG, num_hidden_layers=0), "has no place in it|none of"),
    "an unknown model": (lambda f: edit_json(f / CONFIG, model_type="nonsense"), "transformers can load"),
    "no model type": (lambda f: edit_json(f / CONFIG, model_type=None), "transformers can load"),
    "no numbers": (lambda f: edit_json(f / CONFIG, hidden_size="wide"), "transformers can load"),
    "no quantization": (lambda f: edit_json(f / CONFIG, quantization_config=None), "it is a float one"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_every_wrong_folder_is_one_line(folder: Path, name: str) -> None:
    edit, reason = BROKEN[name]
    edit(folder)
    with pytest.raises(CheckpointError, match=reason) as caught:
        qcompile.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_float_folder_is_checked_as_well(tmp_path: Path, folder: Path) -> None:
    source = float_folder(tmp_path / "float")
    assert torch.equal(logits(load_float(source)), logits(llama()))
    assert load_float(source, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="it is quantized already"):
        load_float(folder)
    change(source, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        load_float(source)


def test_int8_stays_int8_and_is_for_inference(folder: Path) -> None:
    model = qcompile.from_pretrained(folder)
    assert len(quantized_linears(model)) == 7
    assert all(linear.weight.dtype == torch.int8 for linear in quantized_linears(model).values())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.input_scale is attention.v_proj.input_scale


def test_the_original_method_is_written_when_it_is_saved_again(folder: Path, tmp_path: Path) -> None:
    model = qcompile.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    assert read_json(tmp_path / "again" / CONFIG)["quantization_config"]["quant_method"] == "compressed-tensors"
    assert torch.equal(logits(qcompile.from_pretrained(tmp_path / "again")), logits(model))
    token = quantized()
    qcompile.save_pretrained(token, tmp_path / "l", format="lmdeploy")
    again = qcompile.from_pretrained(tmp_path / "l")
    again.save_pretrained(tmp_path / "l2")
    assert read_json(tmp_path / "l2" / CONFIG)["quantization_config"]["quant_method"] == "smooth_quant"
    assert f"{Q}.scale" in load_file(tmp_path / "l2" / WEIGHTS)
    assert torch.equal(logits(qcompile.from_pretrained(tmp_path / "l2")), logits(token))


def test_transformers_own_mapping_stays_as_it_is(folder: Path) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    before = AUTO_QUANTIZER_MAPPING["compressed-tensors"], AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]
    qcompile.from_pretrained(folder)
    assert (
        AUTO_QUANTIZER_MAPPING["compressed-tensors"],
        AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"],
    ) == before
    assert "smooth_quant" not in AUTO_QUANTIZER_MAPPING


def test_the_record_comes_along(tmp_path: Path) -> None:
    model = quantized()
    qcompile.save_pretrained(model, tmp_path / "m")
    assert qcompile.from_pretrained(tmp_path / "m").qcompile_record == model.qcompile_record


def test_scales_of_others_are_taken_as_they_come(folder: Path) -> None:
    """One scale for a weight, a scalar input scale, bfloat16 scales, weights of −128, no method of ours anywhere."""
    expected = qcompile.from_pretrained(folder)
    linear = quantized_linears(expected)[Q]
    with torch.no_grad():
        linear.weight_scale.fill_(0.0078125)
        linear.weight[0, 0] = -128

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.weight_scale"] = torch.tensor([0.0078125], dtype=torch.bfloat16)
        tensors[f"{Q}.input_scale"] = tensors[f"{Q}.input_scale"].reshape(())
        tensors[f"{Q}.weight"][0, 0] = -128

    change(folder, edit)
    model = qcompile.from_pretrained(folder)
    assert torch.equal(logits(model), logits(expected))
    fast = torch.compile(model, backend="w8a8", options={"inner": "eager"})
    torch.testing.assert_close(logits(fast), logits(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["int", "float"])
def test_a_folder_that_the_compressed_tensors_package_wrote(tmp_path: Path, kind: str, strategy: str) -> None:
    """Quantized, compressed and saved by that package alone; with its grid we give its logits."""
    folder, expected = foreign(tmp_path, kind, strategy)
    model = qcompile.from_pretrained(folder)
    if kind == "int":
        assert min(int(linear.weight.min()) for linear in quantized_linears(model).values()) == -128
    with fake_quantized(model):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)


def foreign(path: Path, kind: str, strategy: str) -> tuple[Path, torch.Tensor]:
    """A folder made with compressed-tensors, and the logits that stock transformers gets from it."""
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="needs compressed-tensors")
    from compressed_tensors.compressors import ModelCompressor
    from transformers import AutoModelForCausalLM

    numbers = {"num_bits": 8, "type": kind, "symmetric": True}
    inputs = {"strategy": "token", "dynamic": True} if strategy == "dynamic" else {"strategy": "tensor"}
    group = {
        "targets": ["Linear"], "weights": {**numbers, "strategy": "channel"},
        "input_activations": {**numbers, **inputs},
    }  # fmt: skip
    config = quantization.QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    model = llama()
    quantization.apply_quantization_config(model, config)
    largest = 127.5 if kind == "int" else 448.0
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = (module.weight.abs().amax(1, keepdim=True) / largest).detach()
            if strategy == "static":
                module.input_scale.data = torch.full_like(module.input_scale, 0.02 if kind == "int" else 0.006)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path / "theirs")
    compressor.update_config(path / "theirs")
    stock = AutoModelForCausalLM.from_pretrained(path / "theirs").eval()
    return path / "theirs", logits(stock)


def test_names_are_folders_or_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve("./nowhere") == Path("nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="or a hub name that can be reached; got some-owner/some-model"):
        resolve("some-owner/some-model")


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    float_folder(tmp_path / "m")
    assert load_tokenizer(tmp_path / "m")("ab")["input_ids"] == [3, 4]
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must hold a tokenizer"):
        load_tokenizer(tmp_path / "m")
    edit_json(tmp_path / "m" / CONFIG, num_attention_heads="four")
    with pytest.raises(ConfigError, match=r"a model's config\.json; got .*num_attention_heads.*expected int, got str"):
        load_tokenizer(tmp_path / "m")
