"""Save a captured graph and read it back: a zip archive of graph.json and tensors.safetensors, nothing pickled.

Kept is what passes rely on: nodes with their names, every value's type, symbolic sizes with their ranges, the Input
record of every placeholder, what earlier passes noted; and, where they are there, parameters, the example call's
arguments, and statistics. Programs that torch.export.save wrote are read too (exported_program.py).
"""

import dataclasses
import json
import operator
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from qcompile.atomic_file import replacing
from qcompile.capture import Captured
from qcompile.errors import GraphError, QCompileError
from qcompile.passes.find_linears import LinearInfo
from qcompile.passes.smooth import Smoothing
from qcompile.rewrite import Input, Origin, fake_mode_of, input_of, module_of
from qcompile.saved_graph.symbolic_text import Symbols
from qcompile.saved_graph.values import decode, decode_value, encode, encode_value, target_of, target_text

FORMAT = "qcompile-graph-1"
GRAPH, TENSORS = "graph.json", "tensors.safetensors"
NOTES: dict[str, Any] = {"input": Input, "origin": Origin, "linear": LinearInfo, "smoothing": Smoothing}
FACTS = ("whole_model", "already_quantized", "observed")


def save_graph(captured: Captured, path: str | PathLike[str], statistics: Mapping[str, Tensor] | None = None) -> None:
    """Write a captured graph, complete or not at all. Tensors on the meta device are left out.

    statistics: values for the graph's statistics, by the name of their placeholder. Raises GraphError.
    """
    gm = captured.graph
    environment = fake_mode_of(gm).shape_env
    arguments = [value if isinstance(value, int | float | bool) else None for value in captured.args]
    described = {
        "format": FORMAT,
        "symbols": Symbols(environment).describe() if environment is not None else [],
        "facts": {name: gm.meta[name] for name in FACTS if name in gm.meta},
        "arguments": arguments,
        "nodes": [_describe(node) for node in gm.graph.nodes],
    }
    tensors = {f"argument/{i}": v for i, v in enumerate(captured.args) if isinstance(v, Tensor) and not v.is_meta}
    tensors |= {f"statistic/{name}": value for name, value in (statistics or {}).items()}
    for node in gm.graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(str(node.target))(gm)
        if not isinstance(value, Tensor):
            raise GraphError(f"a graph within a graph cannot be saved; {node.name} is a {type(value).__name__}")
        if not value.is_meta:
            tensors[f"constant/{node.target}"] = value
    # Clones: the format refuses tensors that share memory.
    owned = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    with replacing(path, GraphError) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry(GRAPH), json.dumps(described, ensure_ascii=False, indent=0))
        archive.writestr(_entry(TENSORS), safetensors.torch.save(owned))


def _entry(name: str) -> zipfile.ZipInfo:
    """Without the time of day: the same graph is the same bytes."""
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


def _describe(node: Node) -> dict[str, Any]:
    target = target_text(node.target) if node.op == "call_function" else str(node.target)
    found = {"name": node.name, "op": node.op, "target": target, "args": encode(node.args)}
    if node.kwargs:
        found["kwargs"] = {key: encode(value) for key, value in node.kwargs.items()}
    if "val" in node.meta:
        found["val"] = encode_value(node.meta["val"])
    if module_of(node):
        found["module"] = module_of(node)
    for key, kind in NOTES.items():
        if isinstance(node.meta.get(key), kind):
            found[key] = dataclasses.asdict(node.meta[key])
    return found


@dataclasses.dataclass(frozen=True)
class SavedGraph:
    """A captured graph and the statistics that were saved with it, by the name of their placeholder."""

    captured: Captured
    statistics: dict[str, Tensor]

    @property
    def missing(self) -> list[str]:
        """Parameters and arguments whose values are not there, by name."""
        records = [input_of(node) for node in self.captured.graph.graph.find_nodes(op="placeholder")]
        own = [record for record in records if record.kind != "statistic"]
        return [record.name for record in own if _is_missing(self.captured.args[record.index])]


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, Tensor) and value.is_meta)


def load_graph(path: str | PathLike[str]) -> SavedGraph:
    """Read what `save_graph` or torch.export.save wrote; nothing in the file is run. Raises GraphError."""
    from qcompile.saved_graph.exported_program import read_program

    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise GraphError(f"{path} must be an archive without compression; it has compressed parts")
            if GRAPH in archive.namelist():
                return _load(archive)
    except FileNotFoundError:
        raise GraphError(f"no graph at {path}; write one: qcompile opt MODEL --out graph.pt2") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise GraphError(f"{path} must be a saved graph; {error or type(error).__name__}; save it again") from None
    except QCompileError:
        raise
    except Exception as error:  # a damaged file may fail anywhere
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise GraphError(f"{path} must be a whole saved graph; {reason}; save it again") from None
    return SavedGraph(read_program(Path(path)), {})


def _load(archive: zipfile.ZipFile) -> SavedGraph:
    described = json.loads(archive.read(GRAPH))
    if described["format"] != FORMAT:
        raise GraphError(f"a saved graph must have format {FORMAT}; got {str(described['format'])[:40]!r}")
    tensors = safetensors.torch.load(archive.read(TENSORS))
    symbols = Symbols(ShapeEnv())
    symbols.restore(described["symbols"])
    root = torch.nn.Module()
    for key, value in tensors.items():
        if key.startswith("constant/"):
            root.register_buffer(key.removeprefix("constant/"), value)
    graph, nodes = Graph(), dict[str, Node]()
    with torch._subclasses.FakeTensorMode(shape_env=symbols.environment, allow_non_fake_inputs=True):
        for entry in described["nodes"]:
            nodes[entry["name"]] = _node(graph, entry, nodes, symbols)
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in root._buffers:
            like = node.meta["val"]
            root.register_buffer(node.target, torch.empty(like.shape, dtype=like.dtype, device="meta"))
    graph.lint()
    gm = GraphModule(root, graph)
    facts = described["facts"]
    gm.meta |= {name: _tuples(facts[name]) for name in FACTS if name in facts}
    args = [tensors.get(f"argument/{i}", plain) for i, plain in enumerate(described["arguments"])]
    statistics = {k.removeprefix("statistic/"): v for k, v in tensors.items() if k.startswith("statistic/")}
    _check(gm, args)
    return SavedGraph(Captured(gm, args), statistics)


def _node(graph: Graph, entry: dict[str, Any], nodes: Mapping[str, Node], symbols: Symbols) -> Node:
    op, name, target = entry["op"], entry["name"], entry["target"]
    if op not in ("placeholder", "get_attr", "call_function", "output") or not str(name).isidentifier():
        raise GraphError(f"a graph has inputs, constants, calls and an output; got {op!r}, called {name!r}")
    if op == "get_attr" and not target.isidentifier():
        raise GraphError(f"a constant must have a plain name; got {target!r}")
    found = {"call_function": lambda: target_of(target), "get_attr": lambda: target}.get(op, lambda: name)()
    kwargs = {str(key): decode(value, nodes) for key, value in entry.get("kwargs", {}).items()}
    node = graph.create_node(op, found, decode(entry["args"], nodes), kwargs, name)
    if node.name != name:
        raise GraphError(f"nodes must have names of their own; there are two called {name!r}, or it is no name")
    if "val" in entry:
        node.meta["val"] = decode_value(entry["val"], symbols)
    if "module" in entry:
        node.meta["nn_module_stack"] = {"saved": (str(entry["module"]), "")}
    for key, kind in NOTES.items():
        if key in entry:
            node.meta[key] = kind(**{name: _tuples(value) for name, value in entry[key].items()})
    return node


def _tuples(value: Any) -> Any:
    """JSON has lists only; the records of nodes hold tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _check(gm: GraphModule, args: list[Any]) -> None:
    """Every input must have its record and, if it has a value, the value's type."""
    for node in gm.graph.find_nodes(op="placeholder"):
        record = node.meta.get("input")
        if record is None or not isinstance(record.index, int) or record.kind not in (
            "activation", "parameter", "statistic",
        ):  # fmt: skip
            raise GraphError(f"every input must say what it stands for; {node.name} does not")
        if record.kind == "statistic":
            continue
        if not 0 <= record.index < len(args):
            raise GraphError(f"every input must be one of the {len(args)} arguments; {node.name} is {record.index}")
        value, kept = node.meta["val"], args[record.index]
        if isinstance(kept, Tensor) and (kept.dtype != value.dtype or kept.ndim != value.ndim):
            raise GraphError(f"{record.name} must be {value.dtype} of rank {value.ndim}; its tensor is not")
