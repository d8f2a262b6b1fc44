"""qcompile explain: the library's answer, printed."""

import json
from pathlib import Path

import pytest

from qcompile import cli


def test_it_reads_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert cli.main(["explain", str(tmp_path), "--ignore", "lm_head", "o_proj"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.0.self_attn.o_proj  64×64" in printed
    assert "float: its name matches an ignore pattern" in printed
    assert cli.main(["explain", str(tmp_path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 8


def test_no_model_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "/no/such/model"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
