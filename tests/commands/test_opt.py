"""`qcompile opt`, as a user runs it."""

from pathlib import Path

import pytest
import torch
from checkpoints import float_folder
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from qcompile import cli
from qcompile.passes import PASSES

FIRST = "canonicalize,find_linears,smooth{alpha=0.7},quantize_linears"
SECOND = "share_quantize,merge_siblings,fuse_epilogues,eliminate_dead"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("opt")
    float_folder(place / "model")
    assert cli.main(["opt", str(place / "model"), "--weights", "--out", str(place / "graph.pt2")]) == 0
    return place


def test_a_folder_and_the_file_made_of_it_are_one_graph(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    assert cli.main(["opt", str(place / "model"), "--out", str(place / "structure.pt2")]) == 0
    for graph in ("model", "structure.pt2"):
        assert cli.main(["opt", str(place / graph)]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "# model.layers.0.mlp.up_proj\n" in shown[0]


def test_passes_run_and_refusals_go_to_stderr(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["opt", str(place / "graph.pt2"), "--passes", f"{FIRST},{SECOND}"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("qcompile.scaled_mm(") == 4  # q, k and v are one, and so are gate and up
    assert shown.err.startswith("refused: find_linears: linear_15: lm_head: its name matches an ignore pattern\n")


def test_every_pass_is_held_to_its_bound(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--verify", "--passes", FIRST, "--out", str(place / "h.pt2")]
    assert cli.main(["opt", str(place / "graph.pt2"), *options]) == 0
    shown = capsys.readouterr()
    checked = [line.split(": ")[1] for line in shown.err.splitlines() if line.startswith("checked: ")]
    assert checked == ["canonicalize", "smooth{alpha=0.7}", "quantize_linears"]
    assert shown.out == ""
    assert cli.main(["opt", str(place / "h.pt2"), "--verify", "--passes", SECOND]) == 0  # statistics are in the file
    shown = capsys.readouterr()
    assert "checked: merge_siblings" in shown.err
    assert shown.out.count("qcompile.scaled_mm(") == 4


def test_a_pass_that_is_wrong_is_named(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from subjects import DropBias

    class Wrong(DropBias):
        def run(self, gm):  # type: ignore[no-untyped-def]
            for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
                node.target = torch.ops.aten.sub.Tensor
            return super().run(gm)

    monkeypatch.setattr("qcompile.passes.PASSES", (*PASSES, Wrong))
    assert cli.main(["opt", str(place / "graph.pt2"), "--verify", "--passes", "canonicalize,drop_bias"]) == 2
    assert "qcompile: pass drop_bias must be exact" in capsys.readouterr().err


def test_without_values_numbers_are_not_compared(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["opt", str(place / "model"), "--verify", "--passes", "canonicalize"]) == 0
    assert "numbers were not compared: the graph has no value for " in capsys.readouterr().err


def test_a_program_of_torch_export(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = torch.export.export(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)).eval(), (torch.randn(2, 16),))
    torch.export.save(program, place / "program.pt2")
    passes = "canonicalize,find_linears,quantize_linears"
    assert cli.main(["opt", str(place / "program.pt2"), "--verify", "--passes", passes]) == 0
    shown = capsys.readouterr()
    assert "qcompile.scaled_mm(" in shown.out
    assert "checked: quantize_linears: error " in shown.err


def test_dumps_are_written_if_asked_for(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QCOMPILE_DEBUG", "dump")
    assert cli.main(["opt", str(place / "graph.pt2"), "--passes", "canonicalize"]) == 0
    assert (tmp_path / "qcompile_debug" / "graph-000" / "00.canonicalize.diff").is_file()


def test_an_encoder_decoder_model_is_one_graph_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=64, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    assert cli.main(["opt", str(tmp_path / "t5"), "--passes", FIRST]) == 0
    assert capsys.readouterr().out.count("qcompile.scaled_mm(") > 10


@pytest.mark.parametrize(
    ("graph", "options", "reason"),
    [
        ("graph.pt2", ["--passes", "frob"], "unknown pass 'frob'; the passes are canonicalize, "),
        ("graph.pt2", ["--passes", "smooth{beta=1}"], "unknown option 'beta' for pass smooth"),
        ("graph.pt2", ["--passes", "smooth{alpha=__import__('os')}"], "a pass option must be a literal"),
        ("graph.pt2", ["--passes", "quantize_linears,,"], "a pipeline reads like canonicalize,smooth{alpha=0.5}"),
        ("graph.pt2", ["--weights"], "--weights is about a model folder"),
        ("nothing.pt2", ["--out", "no/such/folder/x.pt2"], "x.pt2 cannot be written: No such file or directory; "),
        ("nothing.pt2", [], "no graph at "),
        ("nothing", [], "MODEL must be a folder with a model's config.json"),
        ("text.txt", [], "must be a saved graph; File is not a zip file"),
    ],
)
def test_mistakes_are_one_line(
    place: Path, graph: str, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["opt", str(place / graph), *options]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
