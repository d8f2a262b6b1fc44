"""`~` means the home folder wherever a path is given."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IDS, llama, quantized, tokenizer
from graphs import ReluMLP, captured

import qcompile
from qcompile import cli
from qcompile.bench.bench import bench
from qcompile.checkpoint.loading import load_float, load_tokenizer
from qcompile.config import Config
from qcompile.paths import expanded
from qcompile.saved_graph.file import load_graph, save_graph
from qcompile.structure import load_structure


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize("path", ["a/~", "/a/~b", "org/name", "~no-such-user/a"])
def test_other_paths_stay(path: str) -> None:
    assert expanded(path) == Path(path)


def test_what_is_written_and_read(home: Path, tmp_path: Path) -> None:
    model = llama()
    qcompile.calibrate(model, [IDS]).save("~/c.safetensors")
    assert qcompile.Calibration.load("~/c.safetensors").tokens == IDS.numel()
    assert Config(calibration="~/c.safetensors").calibrated  # type: ignore[arg-type]
    graph = captured(ReluMLP(), torch.randn(2, 16))
    save_graph(graph, "~/g.pt2")
    assert load_graph("~/g.pt2").captured.args
    model.save_pretrained(home / "float")
    tokenizer().save_pretrained(home / "float")
    qcompile.save_pretrained(quantized(), "~/out", source="~/float")
    assert qcompile.from_pretrained("~/out").qcompile_record is not None
    assert load_tokenizer("~/out") is not None
    assert load_structure("~/float").config.vocab_size == load_float("~/float").config.vocab_size
    assert {path.name for path in home.iterdir()} == {"c.safetensors", "g.pt2", "float", "out"}
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("option", ["dump", "tiles"])
def test_options(option: str, home: Path) -> None:
    options: dict[str, Any] = {option: "~/place"}
    assert getattr(Config(**options), option) == str(home / "place")


def test_commands(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qcompile.save_pretrained(quantized(), home / "q", tokenizer=tokenizer())
    llama().save_pretrained(home / "f")
    small = ["--inner", "eager", "--max-length", "16", "--max-new-tokens", "1"]
    assert cli.main(["generate", "~/q", "--prompt", "a", *small]) == 0
    assert cli.main(["opt", "~/f", "--out", "~/g.pt2"]) == 0
    capsys.readouterr()
    assert cli.main(["opt", "~/g.pt2"]) == 0
    assert "aten.mm" in capsys.readouterr().out
    assert bench("~/f", variants=()) == []
