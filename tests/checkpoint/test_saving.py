"""What save_pretrained writes, and that it comes back bit for bit, in every scheme and format."""

import filecmp
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IDS, float_folder, linear_names, llama, logits, quantized, tokenizer
from safetensors.torch import load_file, save_file

import qcompile
from qcompile.checkpoint import saving
from qcompile.checkpoint.folder import CONFIG, INDEX, RECORD, WEIGHTS, digest, inspect
from qcompile.checkpoint.loading import load_tokenizer
from qcompile.checkpoint.saving import stored_names
from qcompile.errors import CheckpointError
from qcompile.ops import TORCH_DTYPES
from qcompile.quantized_experts import quantized_experts
from qcompile.quantized_linear import quantized_linears

CASES = [
    (dtype, activations, format_)
    for dtype in ("int8", "fp8", "fp8_e5m2")
    for activations in ("token", "static")
    for format_ in ("compressed-tensors", "lmdeploy")
    if not (format_ == "lmdeploy" and activations == "static") and not (format_ != "lmdeploy" and dtype == "fp8_e5m2")
]


@pytest.mark.parametrize(("dtype", "activations", "format_"), CASES)
@pytest.mark.parametrize("load", [torch.float32, torch.bfloat16], ids=str)
def test_loaded_again_it_gives_the_same_bits(
    tmp_path: Path, dtype: str, activations: str, format_: Any, load: torch.dtype
) -> None:
    model = quantized(dtype, activations, load)
    qcompile.save_pretrained(model, tmp_path / "out", format=format_, shard_size=4000)
    again = qcompile.from_pretrained(tmp_path / "out")
    assert again.dtype == load
    assert torch.equal(logits(again), logits(model))
    before = model.state_dict()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), before[name].reshape(-1).view(torch.uint8)), name


def test_names_dtypes_and_shapes_are_those_of_the_format(tmp_path: Path) -> None:
    qcompile.save_pretrained(quantized("int8", "static", torch.bfloat16), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    q = "model.layers.0.self_attn.q_proj."
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items() if k.startswith(q)} == {
        f"{q}weight": (torch.int8, (32, 32)),
        f"{q}weight_scale": (torch.bfloat16, (32, 1)),
        f"{q}input_scale": (torch.float32, (1,)),
    }
    assert torch.equal(tensors[f"{q}input_scale"], tensors[f"{q.replace('q_proj', 'v_proj')}input_scale"])
    assert "lm_head.weight" not in tensors  # tied
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["dtype"] == "bfloat16"
    qcompile.save_pretrained(quantized("int8", "token", torch.bfloat16), tmp_path / "l", format="lmdeploy")
    tensors = load_file(tmp_path / "l" / WEIGHTS)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items() if k.startswith(q)} == {
        f"{q}weight": (torch.int8, (32, 32)),
        f"{q}scale": (torch.float32, (32, 1)),
    }


def test_linear_weights_take_half_of_what_they_took(tmp_path: Path) -> None:
    model = llama(torch.bfloat16, layers=2)
    names = [name for name in linear_names(model) if name != "lm_head"]
    before = sum(model.get_submodule(name).weight.nbytes for name in names)
    qcompile.quantize(model, [IDS])
    qcompile.save_pretrained(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert sum(tensors[f"{name}.weight"].nbytes for name in names) == before / 2


def test_shards_have_an_index(tmp_path: Path) -> None:
    qcompile.save_pretrained(quantized(), tmp_path / "out", shard_size=4000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0].startswith("model-00001-of-")
    assert sorted(set(index["weight_map"].values())) == files
    assert not (tmp_path / "out" / WEIGHTS).exists()


def test_companions_are_copied_and_float_weights_are_not(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    (source / "modeling_own.py").write_text("x = 1")
    (source / "pytorch_model.bin").write_bytes(b"x")
    (source / "LICENSE").write_text("terms")
    qcompile.save_pretrained(quantized(), tmp_path / "out", source=source)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"modeling_own.py", "LICENSE", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= found
    assert {"README.md", CONFIG, RECORD, WEIGHTS} <= found
    assert "pytorch_model.bin" not in found


def test_every_chat_template_is_copied(tmp_path: Path) -> None:
    source, reader = float_folder(tmp_path / "float"), tokenizer()
    reader.chat_template = {"default": "{{ messages }}", "tool_use": "tools {{ messages }}"}
    reader.save_pretrained(source)
    qcompile.save_pretrained(quantized(), tmp_path / "out", source=source)
    assert load_tokenizer(tmp_path / "out").chat_template == reader.chat_template


def test_buffers_of_rare_dtypes(tmp_path: Path) -> None:
    model = quantized()
    model.register_buffer("phases", torch.tensor([1 + 2j], dtype=torch.complex64))
    model.register_buffer("codes", torch.tensor([65535], dtype=torch.uint16))
    qcompile.save_pretrained(model, tmp_path / "out")
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert found["phases"].tolist() == [1 + 2j]
    assert found["codes"].tolist() == [65535]
    model.register_buffer("wide", torch.zeros(1, dtype=torch.complex128))
    with pytest.raises(CheckpointError, match=r"safetensors has no torch.complex128; wide is of it"):
        qcompile.save_pretrained(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_stored_names_hold_each_siblings_scale() -> None:
    tensors = stored_names(quantized(activations="static", load=torch.bfloat16), "lmdeploy")
    q, v = (tensors[f"model.layers.0.self_attn.{name}.input_scale"] for name in ("q_proj", "v_proj"))
    assert torch.equal(q, v)
    assert q.data_ptr() != v.data_ptr()
    assert tensors["model.layers.0.self_attn.q_proj.scale"].dtype == torch.float32
    assert not any(name.endswith("weight_scale") for name in tensors)


def test_transformers_save_and_ours_hold_the_same(tmp_path: Path) -> None:
    qcompile.save_pretrained(quantized(activations="static", load=torch.bfloat16), tmp_path / "ours")
    model = qcompile.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def test_a_tokenizer_alone_is_written_too(tmp_path: Path) -> None:
    qcompile.save_pretrained(quantized(), tmp_path / "out", tokenizer=tokenizer())
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_the_record_has_digests(tmp_path: Path) -> None:
    qcompile.save_pretrained(quantized(), tmp_path / "out")
    values = json.loads((tmp_path / "out" / RECORD).read_text())
    assert values["sha256"] == {WEIGHTS: digest(tmp_path / "out" / WEIGHTS)}
    assert values["record"]["alpha"] == 0.5
    assert values["record"]["tokens"] == 2 * IDS.numel()


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="needs a quantized model"):
        qcompile.save_pretrained(llama(), tmp_path / "out")
    with pytest.raises(CheckpointError, match="format must be one of"):
        qcompile.save_pretrained(quantized(), tmp_path / "out", format="gguf")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no activation scales"):
        qcompile.save_pretrained(quantized(activations="static"), tmp_path / "out", format="lmdeploy")
    block = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 16))
    qcompile.quantize(block, [{"input": torch.randn(2, 16)}])
    block.config = quantized().config  # as wrappers have, such as PEFT's
    with pytest.raises(CheckpointError, match="a model of transformers; got Sequential; save its state_dict"):
        qcompile.save_pretrained(block, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_torch_compile_wraps_is_what_is_saved(tmp_path: Path) -> None:
    model = quantized()
    one, other = (
        qcompile.save_pretrained(given, tmp_path / name)
        for given, name in ((model, "one"), (torch.compile(model, backend="w8a8"), "other"))
    )
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


def test_an_existing_output_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="--overwrite"):
        qcompile.save_pretrained(quantized(), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(CheckpointError, match="only a folder with a config.json is overwritten"):
        qcompile.save_pretrained(quantized(), tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / CONFIG).write_text("{}")
    with pytest.raises(CheckpointError, match="which is read"):
        qcompile.save_pretrained(quantized(), tmp_path / "out", source=tmp_path / "out", overwrite=True)
    qcompile.save_pretrained(quantized(), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.safetensors_writer, "write", full)
    with pytest.raises(CheckpointError, match="needs more space"):
        qcompile.save_pretrained(quantized(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def models() -> dict[str, Any]:
    import transformers as t

    base = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64,
        "max_position_embeddings": 64,
    }  # fmt: skip
    grouped = {**base, "num_key_value_heads": 2}
    plain = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "n_positions": 64, "bos_token_id": 1}
    return {
        "Conv1D": lambda: t.GPT2LMHeadModel(t.GPT2Config(**plain, eos_token_id=2)),
        "biases": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**grouped)),
        "1 + g": lambda: t.GemmaForCausalLM(t.GemmaConfig(**grouped, head_dim=8)),
        "experts": lambda: t.MixtralForCausalLM(t.MixtralConfig(**grouped, num_local_experts=4)),
        "an encoder": lambda: t.BertForMaskedLM(t.BertConfig(**base)),
    }


@pytest.mark.parametrize("name", ["Conv1D", "biases", "1 + g", "experts", "an encoder"])
def test_other_architectures_come_back_too(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = models()[name]().eval()
    qcompile.quantize(model, [IDS], ignore=())
    count = len(quantized_linears(model))
    with torch.no_grad():
        expected = model(IDS).logits
    qcompile.save_pretrained(model, tmp_path / "out")
    again = qcompile.from_pretrained(tmp_path / "out")
    assert len(quantized_linears(again)) == count >= 4
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected)


@pytest.mark.parametrize("format_", ["compressed-tensors", "lmdeploy"])
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_experts_are_stored_one_by_one_and_come_back(tmp_path: Path, format_: Any, dtype: Any) -> None:
    """As engines expect them: a matrix and its scales for each expert, under the names of the float model's files."""
    model = qcompile.quantize(models()["experts"]().eval(), [IDS], dtype=dtype)
    qcompile.save_pretrained(model, tmp_path / "out", format=format_)
    stored = inspect(tmp_path / "out").tensors
    place = "model.layers.0.block_sparse_moe.experts"
    scale = {"compressed-tensors": "weight_scale", "lmdeploy": "scale"}[format_]
    for expert, (name, shape) in itertools.product(range(4), {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}.items()):
        weight = stored[f"{place}.{expert}.{name}.weight"]
        assert (weight.dtype, weight.shape) == (TORCH_DTYPES[dtype], shape)
        assert stored[f"{place}.{expert}.{name}.{scale}"].shape == (shape[0], 1)
    quantization = json.loads((tmp_path / "out" / CONFIG).read_text())["quantization_config"]
    ignored = quantization.get("ignore", quantization.get("modules_to_not_convert"))
    assert not any("experts." in name for name in ignored)
    again = qcompile.from_pretrained(tmp_path / "out")
    (experts,) = quantized_experts(again).values()
    assert experts.quantized_stacks() == ["gate_up_proj", "down_proj"]
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    qcompile.save_pretrained(again, tmp_path / "again", format=format_)
    assert filecmp.cmp(tmp_path / "out" / WEIGHTS, tmp_path / "again" / WEIGHTS, shallow=False)


EXPERT = "model.layers.0.block_sparse_moe.experts.2"


@pytest.mark.parametrize(("damage", "said"), [
    (lambda tensors: tensors.pop(f"{EXPERT}.w2.weight_scale"), "2.w2.weight_scale must be .* it is missing"),
    (lambda tensors: tensors.pop(f"{EXPERT}.w2.weight"), "2.w2.weight must be .* it is missing"),
    (lambda tensors: tensors.update({f"{EXPERT}.w3.weight": torch.zeros(48, 31, dtype=torch.int8)}), "shape .48, 31."),
    (lambda tensors: tensors.update({f"{EXPERT}.w1.weight": torch.zeros(48, 32)}), "2.w1.weight has another"),
    (lambda tensors: tensors[f"{EXPERT}.w1.weight_scale"].fill_(-1), "one of .*gate_up_proj is not"),
])  # fmt: skip
def test_damaged_experts_are_named(tmp_path: Path, damage: Any, said: str) -> None:
    model = qcompile.quantize(models()["experts"]().eval(), [IDS])
    qcompile.save_pretrained(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    damage(tensors)
    save_file(tensors, tmp_path / "out" / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        qcompile.from_pretrained(tmp_path / "out", checksums=False)


def test_experts_alone_may_be_quantized(tmp_path: Path) -> None:
    model = qcompile.quantize(models()["experts"]().eval(), [IDS], ignore=("lm_head", "*self_attn*"))
    assert not quantized_linears(model)
    again = qcompile.from_pretrained(qcompile.save_pretrained(model, tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_float_experts_are_listed_under_their_files_names(tmp_path: Path) -> None:
    model = qcompile.quantize(models()["experts"]().eval(), [IDS], ignore=("lm_head", "*experts"))
    qcompile.save_pretrained(model, tmp_path / "out")
    ignored = json.loads((tmp_path / "out" / CONFIG).read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.block_sparse_moe.experts.3.w2" in ignored
