"""qcompile explain: the library's answer, printed."""

import json
from pathlib import Path

import pytest
import torch
from architectures import tiny
from checkpoints import IDS, llama

import qcompile
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


def test_a_model_that_looks_at_data_needs_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.build("dbrx", torch.float32).save_pretrained(tmp_path)
    capsys.readouterr()
    assert cli.main(["explain", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "DbrxForCausalLM fails on the meta device (NotImplementedError: " in line
    assert line.endswith("load it (explain --weights)")
    assert cli.main(["explain", str(tmp_path), "--weights"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("Wqkv" in line and "int8, per token" in line for line in lines) == 2
    assert lines[-1].startswith("7 linears in ")


@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_weights_may_be_read(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    if kind == "quantized":
        qcompile.save_pretrained(qcompile.quantize(model, [IDS]), tmp_path / "out")
    else:
        model.save_pretrained(tmp_path / "out")
    printed = []
    for more in ([], ["--weights"]):
        assert cli.main(["explain", str(tmp_path / "out"), *more]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert ("stored in int8" in printed[0]) == (kind == "quantized")
