"""What vLLM, SGLang and LMDeploy demand of a folder, checked on the files alone, as docs/scaling.md promises."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IDS, llama, quantized, tokenizer
from safetensors.torch import load_file
from torch import Tensor

import qcompile
from qcompile.checkpoint.saving import CONFIG

# Linears that these engines merge into one product, by the last part of their names.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ARGUMENTS = {"num_bits", "type", "symmetric", "strategy", "dynamic", "group_size"}


def files(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors, json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def linears(tensors: dict[str, Tensor], suffix: str) -> list[str]:
    return sorted(name.removesuffix(suffix) for name in tensors if name.endswith(suffix))


def siblings(names: list[str]) -> list[list[str]]:
    return [
        [name.removesuffix(parts[0]) + part for part in parts]
        for parts in FUSED
        for name in names
        if name.endswith(parts[0])
    ]


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("activations", ["token", "static"])
@pytest.mark.parametrize("load", [torch.float32, torch.bfloat16], ids=str)
def test_vllm_and_sglang(tmp_path: Path, dtype: str, activations: str, load: torch.dtype) -> None:
    model = quantized(dtype, activations, load)
    original = {name for name in llama(load).state_dict() if name != "lm_head.weight"}
    qcompile.save_pretrained(model, tmp_path / "out", tokenizer=tokenizer(), shard_size=4000)
    tensors, config = files(tmp_path / "out")
    names = linears(tensors, ".weight_scale")
    static = activations == "static"
    own = {f"{name}.{kind}" for name in names for kind in ("weight_scale", *(["input_scale"] if static else []))}
    assert set(tensors) == original | own  # unfused names, no zero points, nothing else
    kind = torch.int8 if dtype == "int8" else torch.float8_e4m3fn
    for name in names:
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        assert weight.dtype == kind
        assert scale.shape == (len(weight), 1)
        assert scale.dtype == load  # transformers would round any other
        assert bool((scale > 0).all())
        if static:
            assert tensors[f"{name}.input_scale"].shape == (1,)
    assert len(siblings(names)) == 2
    for parts in siblings(names):
        assert set(parts) <= set(names)  # quantized together
        if static:  # the last one that is read counts for all
            assert len({float(tensors[f"{part}.input_scale"]) for part in parts}) == 1
    check_config(config["quantization_config"], dtype, static)


def check_config(config: dict[str, Any], dtype: str, static: bool) -> None:
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == ("int-quantized" if dtype == "int8" else "float-quantized")
    assert config["quantization_status"] == "compressed"
    assert "lm_head" in config["ignore"]
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    weights, inputs = group["weights"], group["input_activations"]
    assert set(weights) <= ARGUMENTS  # unknown keys are an error of loading
    assert set(inputs) <= ARGUMENTS
    assert weights["strategy"] == "channel"
    assert inputs["strategy"] == ("tensor" if static else "token")
    assert inputs["dynamic"] is not static
    assert weights["symmetric"] is inputs["symmetric"] is True


@pytest.mark.parametrize("dtype", ["int8", "fp8", "fp8_e5m2"])
def test_lmdeploy(tmp_path: Path, dtype: str) -> None:
    qcompile.save_pretrained(quantized(dtype), tmp_path / "out", format="lmdeploy")
    tensors, config = files(tmp_path / "out")
    names = linears(tensors, ".scale")
    assert not [name for name in tensors if re.search(r"_scale$|zero", name)]
    for name in names:
        assert tensors[f"{name}.weight"].dtype == qcompile.Config(dtype=dtype).torch_dtype  # type: ignore[arg-type]
        assert tensors[f"{name}.scale"].dtype == torch.float32
        assert tensors[f"{name}.scale"].shape == (len(tensors[f"{name}.weight"]), 1)
    assert all(set(parts) <= set(names) for parts in siblings(names))
    assert config["quantization_config"]["quant_method"] == "smooth_quant"


def test_ignore_may_tell_siblings_apart(tmp_path: Path) -> None:
    """An ignore pattern may split q, k and v; the files then say so, and docs/scaling.md warns of it."""
    model = qcompile.quantize(llama(), [IDS], ignore=("lm_head", "*k_proj"))
    qcompile.save_pretrained(model, tmp_path / "out")
    _, config = files(tmp_path / "out")
    assert "model.layers.0.self_attn.k_proj" in config["quantization_config"]["ignore"]
