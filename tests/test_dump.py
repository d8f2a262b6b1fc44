"""Dumps: the same graph is the same text, and every file says how it came about."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from graphs import Attention, GatedMLP, ReluMLP, captured
from torch import nn
from torch.fx import GraphModule

from qcompile import passes
from qcompile.config import Config
from qcompile.dump import DumpTo, graph_text, type_text
from qcompile.errors import ConfigError
from qcompile.pass_pipeline import Pipeline
from qcompile.passes import PASSES

RELU_MLP = """\
arg0_1: f32[16] = input  # parameter norm.weight
arg1_1: f32[16] = input  # parameter norm.bias
arg2_1: f32[2, 16] = input  # activation l_arguments_x_
arg3_1: f32[24, 16] = input  # parameter fc1.weight
arg4_1: f32[24] = input  # parameter fc1.bias
arg5_1: f32[16, 24] = input  # parameter fc2.weight
arg6_1: f32[16] = input  # parameter fc2.bias
"""


def dumped(folder: Path, config: Config, model: nn.Module | None = None) -> Path:
    pipeline = passes.quantizing(config)
    graph = captured(model or ReluMLP(), torch.randn(2, 16)).graph
    pipeline.run(graph, [DumpTo(folder, pipeline.to_text())])
    return max(folder.iterdir())


@pytest.mark.parametrize(("kind", "dynamic"), [(GatedMLP, False), (Attention, False), (ReluMLP, True)])
def test_two_captures_give_the_same_text(kind: type[nn.Module], dynamic: bool) -> None:
    texts = []
    for _ in range(2):
        torch._dynamo.reset()
        graph = captured(kind(), torch.randn(2, 5, 16), dynamic=dynamic).graph
        quantized, _ = passes.quantizing(Config(calibrate=1)).run(graph)
        texts.append(graph_text(graph) + graph_text(quantized))
    assert texts[0].encode() == texts[1].encode()
    assert "0x" not in texts[0]


def test_the_text_of_a_graph() -> None:
    text = graph_text(captured(ReluMLP(), torch.randn(2, 16)).graph)
    assert text.startswith(RELU_MLP)
    assert "\nrelu: f32[2, 24] = aten.relu(addmm)" in text
    assert "native_layer_norm: (f32[2, 16], f32[2, 1], f32[2, 1]) = aten.native_layer_norm(arg2_1, [16], " in text
    assert "\naddmm: f32[2, 24] = aten.addmm(arg4_1, getitem, permute)  # fc1\n" in text
    assert text.endswith("\nreturn [addmm_1]\n")


def test_quantized_nodes_say_what_they_replace() -> None:
    graph = captured(ReluMLP(), torch.randn(2, 16)).graph
    text = graph_text(passes.quantizing(Config()).run(graph)[0])
    line = next(line for line in text.splitlines() if line.startswith("q: i8[24, 16]"))
    assert line.endswith("# quantize_linears ← weight_quantize  fc1")
    assert re.search(r"scaled_mm\w*: f32\[2, 24\] = qcompile\.scaled_mm\(.*, 'relu', f32\)  # fuse_epilogues ← ", text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3), "f32[2, 3]"),
        (torch.zeros((), dtype=torch.bfloat16), "bf16[]"),
        (torch.zeros(1, dtype=torch.float8_e4m3fn), "f8e4m3[1]"),
        (torch.zeros(1, dtype=torch.complex64), "complex64[1]"),
        ((torch.zeros(1), torch.zeros(2, dtype=torch.int8)), "(f32[1], i8[2])"),
        (None, "NoneType"),
        (3, "int"),
    ],
)
def test_types_are_short(value: object, text: str) -> None:
    assert type_text(value) == text


def test_every_pass_has_three_files(tmp_path: Path) -> None:
    folder = dumped(tmp_path / "dump", Config())
    names = [step.name for step in passes.quantizing(Config()).passes]
    expected = {f"{i:02d}.{name}.{kind}" for i, name in enumerate(names) for kind in ("before.py", "after.py", "diff")}
    assert {file.name for file in folder.iterdir()} == expected


def test_graphs_get_folders_of_their_own(tmp_path: Path) -> None:
    for index in range(3):
        assert dumped(tmp_path, Config()).name == f"graph-{index:03d}"
    (tmp_path / "graph-notes").mkdir()
    pipeline = Pipeline(())
    pipeline.run(captured(ReluMLP(), torch.randn(2, 16)).graph, [DumpTo(tmp_path, "")])
    assert (tmp_path / "graph-003").is_dir()


def body(file: Path) -> str:
    return "".join(line for line in file.read_text(encoding="utf-8").splitlines(True) if not line.startswith("# "))


def test_steps_join(tmp_path: Path) -> None:
    folder = dumped(tmp_path, Config())
    befores, afters = sorted(folder.glob("*.before.py")), sorted(folder.glob("*.after.py"))
    for after, before in zip(afters, befores[1:], strict=False):
        assert body(after) == body(before)


def test_the_diff_is_between_before_and_after(tmp_path: Path) -> None:
    folder = dumped(tmp_path, Config())
    lines = (folder / "02.quantize_linears.diff").read_text(encoding="utf-8").splitlines()
    before, after = (body(folder / f"02.quantize_linears.{kind}.py").splitlines() for kind in ("before", "after"))
    removed = [line[1:] for line in lines if line.startswith("-") and not line.startswith("---")]
    added = [line[1:] for line in lines if line.startswith("+") and not line.startswith("+++")]
    assert removed
    assert added
    assert set(removed) <= set(before)
    assert set(added) <= set(after)


def test_the_header_says_how_to_make_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["my script.py", "--model", "a b"])
    folder = dumped(tmp_path, Config(ignore=("fc2",)))
    for file in folder.iterdir():
        header = [line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        assert header[0] == "reproduce: QCOMPILE_DEBUG=dump python 'my script.py' --model 'a b'"
        name = file.name.split(".")[1]
        assert re.fullmatch(rf"pass: {name}(\{{.*\}})?  \(\d+ edits\)", header[1])
        text = header[2].removeprefix("pipeline: ")
        assert Pipeline.from_text(text, PASSES) == passes.quantizing(Config(ignore=("fc2",)))
        assert re.fullmatch(r"graph: \d+ nodes, 6 parameters", header[3])
        refused = [line for line in header if line.startswith("refused: ")]
        assert refused == (
            ["refused: linear_1: fc2: its name matches an ignore pattern"] if name == "find_linears" else []
        )


@pytest.mark.parametrize("argv", [[], [""], ["-c", "secret"]])
def test_a_process_without_a_script_gives_no_false_command(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    file = next(dumped(tmp_path, Config()).iterdir())
    assert file.read_text(encoding="utf-8").startswith("# reproduce: QCOMPILE_DEBUG=dump python '…'\n")


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (dumped(tmp_path / name, Config(calibrate=1)) for name in ("a", "b"))
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()


@pytest.mark.parametrize("place", ["file", "file/dump", "/proc/dump"])
def test_a_folder_that_cannot_be_written_is_one_line(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="^dumps need a folder that can be written; .*; choose another$"):
        dumped(tmp_path / place, Config())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_vanishes_meanwhile_is_one_line(tmp_path: Path) -> None:
    dump = DumpTo(tmp_path / "dump", "")
    pipeline = passes.quantizing(Config())
    start = dump.start

    def starting(gm: GraphModule) -> None:
        start(gm)
        shutil.rmtree(tmp_path / "dump")

    dump.start = starting  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="^dumps need a folder that can be written; .*No such file"):
        pipeline.run(captured(ReluMLP(), torch.randn(2, 16)).graph, [dump])
