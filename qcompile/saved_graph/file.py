"""Save a captured graph and read it back: a zip archive of graph.json and tensors.safetensors, nothing pickled.

Kept is what passes rely on: nodes with their names, every value's type, symbolic sizes with their ranges, the Input
record of every placeholder, what earlier passes noted; and, where they are there, parameters, the example call's
arguments, and statistics. Programs that torch.export.save wrote are read too (exported_program.py).
"""

import dataclasses
import json
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.fx import GraphModule

from qcompile.atomic_file import replacing
from qcompile.captured import Captured
from qcompile.errors import GraphError, QCompileError
from qcompile.paths import expanded
from qcompile.rewrite import input_of
from qcompile.saved_graph.nodes import describe, restore

FORMAT = "qcompile-graph-1"
GRAPH, TENSORS = "graph.json", "tensors.safetensors"


def save_graph(captured: Captured, path: str | PathLike[str], statistics: Mapping[str, Tensor] | None = None) -> None:
    """Write a captured graph, complete or not at all. Tensors on the meta device are left out.

    statistics: values for the graph's statistics, by the name of their placeholder. Raises GraphError.
    """
    described, constants = describe(captured.graph)
    arguments = [value if isinstance(value, int | float | bool) else None for value in captured.args]
    tensors = {f"argument/{i}": v for i, v in enumerate(captured.args) if isinstance(v, Tensor) and not v.is_meta}
    tensors |= {f"statistic/{name}": value for name, value in (statistics or {}).items()}
    tensors |= {f"constant/{name}": value for name, value in constants.items()}
    with replacing(path, GraphError) as partial:
        write_archive(partial, {"format": FORMAT, "arguments": arguments, **described}, tensors)


def write_archive(path: Path, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Both in one file; equal contents are equal bytes. Raises GraphError."""
    # Clones: the format refuses tensors that share memory.
    owned = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    try:
        packed = safetensors.torch.save(owned)
    except KeyError as unknown:  # complex128, say
        raise GraphError(f"tensors must be of a dtype that safetensors knows; got {unknown}; convert them") from None
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry(GRAPH), json.dumps(described, ensure_ascii=False, indent=0))
        archive.writestr(_entry(TENSORS), packed)


def _entry(name: str) -> zipfile.ZipInfo:
    """Without the time of day: the same graph is the same bytes."""
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


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

    path = expanded(path)
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
    return SavedGraph(read_program(path), {})


def _load(archive: zipfile.ZipFile) -> SavedGraph:
    described, tensors = read_archive(archive, FORMAT)
    gm = restore(described, under(tensors, "constant/"))
    args = [tensors.get(f"argument/{i}", plain) for i, plain in enumerate(described["arguments"])]
    _check(gm, args)
    return SavedGraph(Captured(gm, args), under(tensors, "statistic/"))


def read_archive(archive: zipfile.ZipFile, form: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_archive` wrote under a format's name. Raises GraphError, and whatever a damaged file leads to."""
    described = json.loads(archive.read(GRAPH))
    if described["format"] != form:
        raise GraphError(f"a saved graph must have format {form}; got {str(described['format'])[:40]!r}")
    return described, safetensors.torch.load(archive.read(TENSORS))


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose keys start with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


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
