"""A model's structure from its folder: no weights, and one line for whatever is no model."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from qcompile.errors import ConfigError
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
