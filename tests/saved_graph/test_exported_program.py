"""Programs of torch.export: the ones that are safe are traced, the others are refused before torch sees them."""

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import outputs
from torch import nn

from qcompile import ops, passes
from qcompile.config import Config
from qcompile.dump import graph_text
from qcompile.errors import GraphError
from qcompile.rewrite import input_of
from qcompile.saved_graph.file import load_graph, save_graph


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.out = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16, bias=False)
        self.register_buffer("gain", torch.full((16,), 2.0))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        y: torch.Tensor = self.out(torch.relu(self.fc(self.norm(x) * self.gain))) * scale
        return y


class Marker:
    """Unpickling this leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "small.pt2"
    batch = torch.export.Dim("batch", min=2, max=64)
    torch.manual_seed(0)
    exported = torch.export.export(
        Small().eval(), (torch.randn(3, 16), 0.5), dynamic_shapes={"x": {0: batch}, "scale": None}
    )
    torch.export.save(exported, path)
    return path


def test_a_program_becomes_a_captured_graph(program: Path) -> None:
    found = load_graph(program)
    records = [input_of(node) for node in found.captured.graph.graph.find_nodes(op="placeholder")]
    assert [(record.kind, record.name, record.buffer) for record in records] == [
        ("parameter", "norm.weight", False),
        ("parameter", "norm.bias", False),
        ("parameter", "fc.weight", False),
        ("parameter", "fc.bias", False),
        ("parameter", "out.weight", False),
        ("parameter", "gain", True),
        ("activation", "x", False),
    ]
    assert found.missing == []
    text = graph_text(found.captured.graph)
    assert "aten.addmm(" in text
    assert "# fc\n" in text
    assert ": f32[s" in text
    torch.manual_seed(0)
    expected = Small().eval()(found.captured.args[-1], 0.5)
    torch.testing.assert_close(outputs(found.captured.graph, found.captured)[0], expected)


def test_passes_run_on_it(program: Path) -> None:
    gm, _ = passes.quantizing(Config()).run(load_graph(program).captured.graph)
    assert len(gm.graph.find_nodes(op="call_function", target=ops.scaled_mm)) == 2


def test_it_can_be_saved_as_one_of_ours(program: Path, tmp_path: Path) -> None:
    first = load_graph(program).captured
    save_graph(first, tmp_path / "ours.pt2")
    assert graph_text(load_graph(tmp_path / "ours.pt2").captured.graph) == graph_text(first.graph)


def rewritten(program: Path, path: Path, edits: dict[str, Callable[[bytes], bytes] | bytes]) -> Path:
    """The program with some of its entries changed or added."""
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(path, "w") as new:
        entries = {name: old.read(name) for name in old.namelist()}
        for tail, edit in edits.items():
            name = next((name for name in entries if name.endswith(tail)), f"small/{tail}")
            entries[name] = edit if isinstance(edit, bytes) else edit(entries[name])
        for name, data in entries.items():
            new.writestr(name, data)
    return path


def replaced(old: str, new: str) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        text = data.decode()
        assert old in text
        return text.replace(old, new).encode()

    return edit


def pickled_weight(data: bytes) -> bytes:
    config = json.loads(data)
    config["config"]["fc.bias"]["use_pickle"] = True
    return json.dumps(config).encode()


def torch_saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


HIDDEN = r'{\"default\\u005ffactory_module\": 1}'  # as a call signature could hold it


def test_nothing_is_unpickled_or_evaluated(program: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    evil = torch_saved(((Marker(mark),), {}))
    pickle.loads(pickle.dumps(Marker(mark)))
    assert mark.exists()  # the marker works
    mark.unlink()
    code = f"__import__('pathlib').Path({str(mark)!r}).touch() or Symbol('s9')"
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "inputs": ({"sample_inputs/model.pt": evil}, "sample inputs must be tensors and plain values"),
        "weight": (
            {"model_weights_config.json": pickled_weight, "weights/weight_9": evil},
            "weights must be plain bytes; fc.bias is pickled",
        ),
        "legacy": ({"data/weights/model.pt": evil}, "is none of them and is not read"),
        "object": ({"data/constants/opaque_obj_0": evil}, "is none of them and is not read"),
        "library": ({"data/aotinductor/model/a.so": b""}, "is none of them and is not read"),
        "size": ({"models/model.json": replaced('"Symbol(', json.dumps(code)[:-1] + "+(")}, "must be arithmetic"),
        "operator": (
            {"models/model.json": replaced("torch.ops.aten.relu.default", "torch.os.system")},
            "a program may call operators of aten, prims, qcompile and arithmetic; got 'torch.os.system'",
        ),
        "python": (
            {"models/model.json": replaced("torch.ops.aten.relu.default", "_operator.attrgetter")},
            "a program may call operators",
        ),
        "unknown": (
            {"models/model.json": replaced("torch.ops.aten.relu.default", "torch.ops.aten.from_file.default")},
            "a graph may call operators",
        ),
        "enum": ({"models/model.json": replaced('"guards_code"', '"__enum__": 1, "guards_code"')}, "holds __enum__"),
        "import": (
            {"models/model.json": replaced('"guards_code"', rf'"a": "[{HIDDEN}]", "guards_code"')},
            "holds default_factory_module",
        ),
        "json": ({"models/model.json": b"{"}, "must be a whole exported program"),
        "schema": ({"models/model.json": b"{}"}, "must be a whole exported program"),
    }
    for case, (edits, reason) in cases.items():
        with pytest.raises(GraphError) as caught:
            load_graph(rewritten(program, tmp_path / f"{case}.pt2", edits))
        assert reason in str(caught.value), case
        assert "\n" not in str(caught.value), case
        assert not mark.exists(), case


def test_torch_itself_would_have_run_it(program: Path, tmp_path: Path) -> None:
    """If this fails, torch has become careful, and so may exported_program.py."""
    mark = tmp_path / "mark"
    path = rewritten(program, tmp_path / "evil.pt2", {"sample_inputs/model.pt": torch_saved(((Marker(mark),), {}))})
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert mark.exists()


@pytest.mark.parametrize("names", [["a/x", "b/y"], ["a/x", "a/x"], ["a/x"]])
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_other_archives_are_refused(names: list[str], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt2", "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    with pytest.raises(GraphError, match="must be a graph saved by qcompile or torch.export.save"):
        load_graph(tmp_path / "x.pt2")
