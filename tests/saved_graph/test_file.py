"""A saved graph is the graph: text, records, symbolic sizes, what passes do to it, what it computes."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import Attention, GatedMLP, ReluMLP, captured, outputs
from torch import nn
from torch.fx import Interpreter

from qcompile import passes
from qcompile.captured import Captured
from qcompile.config import Config
from qcompile.dump import graph_text
from qcompile.errors import GraphError
from qcompile.pass_pipeline import Pipeline
from qcompile.rewrite import input_of
from qcompile.saved_graph.file import GRAPH, TENSORS, load_graph, save_graph
from qcompile.verify import Verify

WHOLE = passes.quantizing(Config(calibrate=1))


def saved(captured: Captured, path: Path, **options: Any) -> Captured:
    save_graph(captured, path, **options)
    return load_graph(path).captured


@pytest.mark.parametrize(
    ("kind", "dynamic", "cut"),
    [
        (GatedMLP, False, 0), (GatedMLP, False, len(WHOLE.passes)), (Attention, True, 3), (ReluMLP, True, 0),
        (ReluMLP, True, 1), (ReluMLP, True, 5),
    ],
)  # fmt: skip
def test_passes_before_and_after_a_file_are_passes_in_one_go(
    kind: type[nn.Module], dynamic: bool, cut: int, tmp_path: Path
) -> None:
    first = captured(kind(), torch.randn(2, 5, 16), dynamic=dynamic)
    half, _ = Pipeline(WHOLE.passes[:cut]).run(first.graph)
    again = saved(Captured(half, first.args), tmp_path / "g.pt2")
    assert graph_text(again.graph) == graph_text(half)
    verify = Verify(full=True)
    finished, _ = Pipeline(WHOLE.passes[cut:]).run(again.graph, [verify])
    assert graph_text(finished) == graph_text(WHOLE.run(first.graph)[0])


def test_records_and_arguments_come_back(tmp_path: Path) -> None:
    first = captured(ReluMLP(), torch.randn(3, 16), dynamic=True)
    again = saved(first, tmp_path / "g.pt2")
    old, new = (list(one.graph.graph.find_nodes(op="placeholder")) for one in (first, again))
    assert list(map(input_of, old)) == list(map(input_of, new))
    for left, right in zip(first.args, again.args, strict=True):
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
    assert again.graph.meta["whole_model"] is True


def test_it_computes_the_same(tmp_path: Path) -> None:
    first = captured(GatedMLP(), torch.randn(3, 16))
    quantized, _ = WHOLE.run(first.graph)
    again = saved(Captured(quantized, first.args), tmp_path / "g.pt2")
    for left, right in zip(outputs(quantized, first), outputs(again.graph, again), strict=True):
        assert torch.equal(left, right)


def test_sizes_stay_symbolic_and_keep_their_range(tmp_path: Path) -> None:
    first = captured(ReluMLP(), torch.randn(6, 16), dynamic=True)
    again = saved(first, tmp_path / "g.pt2")
    x = next(n for n in again.graph.graph.find_nodes(op="placeholder") if n.meta["val"].__class__ is not torch.SymInt
             and input_of(n).kind == "activation")  # fmt: skip
    size = x.meta["val"].shape[0]
    assert isinstance(size, torch.SymInt)
    assert size.node.hint == 6
    limits = size.node.shape_env.var_to_range[size.node.expr]
    assert limits.lower >= 2


def test_without_weights_the_structure_is_there(tmp_path: Path) -> None:
    with torch.device("meta"):
        model, x = GatedMLP(), torch.randn(2, 16)
    first = captured(model, x)
    quantized, _ = WHOLE.run(first.graph)
    save_graph(Captured(quantized, first.args), tmp_path / "g.pt2")
    again = load_graph(tmp_path / "g.pt2")
    assert graph_text(again.captured.graph) == graph_text(quantized)
    assert len(again.missing) == len(first.args)
    assert (tmp_path / "g.pt2").stat().st_size < 60_000


def test_statistics_are_kept_by_their_placeholder(tmp_path: Path) -> None:
    first = captured(GatedMLP(), torch.randn(2, 16))
    gm, _ = WHOLE.run(first.graph)
    names = [n.name for n in gm.graph.find_nodes(op="placeholder") if input_of(n).kind == "statistic"]
    save_graph(Captured(gm, first.args), tmp_path / "g.pt2", {name: torch.ones(16) for name in names})
    assert set(load_graph(tmp_path / "g.pt2").statistics) == set(names) != set()


def test_the_same_graph_is_the_same_bytes(tmp_path: Path) -> None:
    x = torch.ones(2, 16)
    for name in ("a", "b"):
        torch.manual_seed(0)
        torch._dynamo.reset()
        save_graph(captured(ReluMLP(), x), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def edited(path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A saved graph with its description changed."""
    save_graph(captured(ReluMLP(), torch.randn(2, 16)), path)
    with zipfile.ZipFile(path) as archive:
        described, tensors = json.loads(archive.read(GRAPH)), archive.read(TENSORS)
    edit(described)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(GRAPH, json.dumps(described))
        archive.writestr(TENSORS, tensors)
    return path


def node(described: dict[str, Any], op: str) -> dict[str, Any]:
    return next(entry for entry in described["nodes"] if entry["op"] == op)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "operator": (lambda d: node(d, "call_function").update(target="os.system.default"), "a graph may call operators"),
    "file": (lambda d: node(d, "call_function").update(target="aten.from_file.default"), "a graph may call operators"),
    "name": (lambda d: node(d, "call_function").update(name="x\nimport os"), "a graph has inputs, constants, calls"),
    "keyword": (lambda d: node(d, "call_function").update(name="lambda"), "nodes must have names of their own"),
    "twice": (lambda d: d["nodes"].insert(0, d["nodes"][0]), "nodes must have names of their own"),
    "method": (lambda d: node(d, "call_function").update(op="call_method"), "a graph has inputs, constants, calls"),
    "attribute": (lambda d: node(d, "output").update(op="get_attr", target="a.b"), "a constant must have a plain name"),
    "size": (
        lambda d: d["nodes"][0].update(val={"tensor": ["float32", [{"int": "exit()"}], [1], "cpu"]}),
        "a symbolic size must be arithmetic",
    ),
    "dtype": (lambda d: d["nodes"][0]["val"]["tensor"].__setitem__(0, "load"), "is no dtype that torch knows"),
    "record": (lambda d: d["nodes"][0].pop("input"), "every input must say what it stands for"),
    "kind": (lambda d: d["nodes"][0]["input"].update(kind="secret"), "every input must say what it stands for"),
    "index": (lambda d: d["nodes"][0]["input"].update(index=99), "every input must be one of the 7 arguments"),
    "type": (lambda d: d["nodes"][0]["val"]["tensor"].__setitem__(0, "int8"), "norm.weight must be torch.int8"),
    "format": (lambda d: d.update(format="other"), "must have format qcompile-graph-1"),
    "missing": (lambda d: d.pop("nodes"), "must be a whole saved graph; KeyError"),
    "forward": (lambda d: d["nodes"].reverse(), "must be a whole saved graph"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_and_broken_graphs_are_one_line(case: str, tmp_path: Path) -> None:
    edit, reason = HOSTILE[case]
    with pytest.raises(GraphError) as caught:
        load_graph(edited(tmp_path / "g.pt2", edit))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_truncation_is_one_line(tmp_path: Path) -> None:
    save_graph(captured(ReluMLP(), torch.randn(2, 16)), tmp_path / "g.pt2")
    data = (tmp_path / "g.pt2").read_bytes()
    for share in (0, 0.1, 0.5, 0.9, 0.999):
        (tmp_path / "g.pt2").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(GraphError, match=r"g\.pt2 must be a"):
            load_graph(tmp_path / "g.pt2")


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "g.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(GRAPH, "0" * 10_000_000)
    with pytest.raises(GraphError, match="without compression"):
        load_graph(tmp_path / "g.pt2")


@pytest.mark.parametrize("path", ["no/such/folder/g.pt2"])
def test_paths_that_are_not_there(path: str, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="^no graph at "):
        load_graph(tmp_path / path)
    with pytest.raises(GraphError, match="cannot be written: No such file or directory; choose another place$"):
        save_graph(captured(ReluMLP(), torch.randn(2, 16)), tmp_path / path)


def test_module_names_with_anything_in_them(tmp_path: Path) -> None:
    model = nn.ModuleDict({"<b>ü \"'": nn.Linear(16, 16)})
    model.forward = lambda x: model["<b>ü \"'"](x)  # type: ignore[method-assign]
    first = captured(model, torch.randn(2, 16))
    again = saved(first, tmp_path / "g.pt2")
    assert graph_text(again.graph) == graph_text(first.graph)
    assert "<b>ü" in graph_text(again.graph)
    with torch.no_grad():
        assert Interpreter(again.graph).run(*again.args)[0].isfinite().all()
