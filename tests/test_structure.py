"""A model's structure from its folder: no weights, and one line for whatever is no model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IDS, edit_json, quantized
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM

import qcompile
from qcompile.errors import CheckpointError, ConfigError
from qcompile.quantized_experts import quantized_experts
from qcompile.quantized_linear import quantized_linears
from qcompile.structure import load_structure

DEMO = Path(__file__).parents[1] / "qcompile" / "demo_model"


def test_the_structure_is_on_the_meta_device() -> None:
    model = load_structure(str(DEMO))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied as in the real model"
    assert not model.training


def test_a_config_alone_will_do(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=8192, num_hidden_layers=80, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert sum(parameter.numel() for parameter in load_structure(str(tmp_path)).parameters()) > 30e9


def held(model: Any) -> dict[str, tuple[torch.dtype, bool]]:
    """The linears and experts that a model holds in 8 bits."""
    linears = {name: (m.weight.dtype, m.input_scale is not None) for name, m in quantized_linears(model).items()}
    stacks = {
        f"{name}.{stack}": (getattr(experts, stack).dtype, False)
        for name, experts in quantized_experts(model).items() for stack in experts.quantized_stacks()
    }  # fmt: skip
    return linears | stacks


def mixtral() -> Any:
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=4,
    )  # fmt: skip
    return qcompile.quantize(MixtralForCausalLM(config).eval(), [IDS], ignore=("lm_head", "q_proj", "*down_proj"))


@pytest.mark.parametrize("layout", ["compressed-tensors", "lmdeploy"])
@pytest.mark.parametrize("make", [quantized, lambda: quantized("fp8"), mixtral], ids=["int8", "fp8", "mixtral"])
def test_a_quantized_folder_is_a_quantized_model(make: Callable[[], Any], layout: Any, tmp_path: Path) -> None:
    model = make()
    qcompile.save_pretrained(model, tmp_path, format=layout)
    structure = load_structure(str(tmp_path))
    assert held(structure) == held(model)
    assert {tensor.device.type for tensor in structure.parameters()} == {"meta"}
    (tmp_path / "model.safetensors").unlink()
    assert held(load_structure(str(tmp_path))) == held(model), "as the config alone says"


def test_static_activations_and_one_scale_per_weight(tmp_path: Path) -> None:
    qcompile.save_pretrained(quantized(activations="static"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    save_file(tensors | {name: tensors[name].max().reshape(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    structure = load_structure(str(tmp_path))
    assert held(structure) == held(quantized(activations="static"))
    assert structure.get_parameter(name).shape == (48, 1)


def test_what_others_quantized_is_refused(tmp_path: Path) -> None:
    qcompile.save_pretrained(quantized(), tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="quant_method must be compressed-tensors or smooth_quant"):
        load_structure(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "MODEL must be a folder with a model's config.json; got"),
        ("{", "MODEL must be a folder with a model's config.json; got"),
        (json.dumps({"model_type": "no such type"}), "MODEL must be a folder with a model's config.json; got"),
        (json.dumps({"model_type": "llama", "num_hidden_layers": -1.5}), "config.json"),
        (json.dumps({"model_type": "llama", "hidden_size": 7, "architectures": ["LlamaForCausalLM"]}), "config.json"),
    ],
)
def test_what_is_no_model_is_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_structure(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"got /no/such/model \(no such folder\)"):
        load_structure("/no/such/model")
