"""The command line, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qcompile import cli
from qcompile.passes import PASSES


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "qcompile", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **environment}
    )


def test_passes_lists_every_pass_and_both_pipelines(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["passes"]) == 0
    printed = capsys.readouterr().out
    for kind in PASSES:
        assert kind.name in printed
    assert "alpha=0.5" in printed
    assert "quantize: canonicalize,find_linears,smooth,quantize_linears" in printed


def test_passes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["passes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed["passes"]] == [kind.name for kind in PASSES]
    assert set(listed["pipelines"]) == {"observe", "quantize"}


def test_a_mistake_is_one_line_and_status_2() -> None:
    result = run("demo", "--windows", "0")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "windows" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_command_is_status_2() -> None:
    result = run("frobnicate")
    assert result.returncode == 2
    assert "frobnicate" in result.stderr


def test_version() -> None:
    assert run("--version").stdout.startswith("qcompile 0.")


def test_explain_reads_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert cli.main(["explain", str(tmp_path), "--ignore", "lm_head", "o_proj"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.0.self_attn.o_proj  64×64" in printed
    assert "float: its name matches an ignore pattern" in printed
    assert cli.main(["explain", str(tmp_path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 8


def test_explain_of_no_model_is_one_line_and_status_2() -> None:
    result = run("explain", "/no/such/model")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
