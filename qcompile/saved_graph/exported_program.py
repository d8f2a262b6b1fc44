"""Programs that torch.export.save wrote, as captured graphs.

torch.export.load runs what it finds in a file: it unpickles sample inputs, odd tensors and objects, and evaluates
symbolic sizes as Python. So an archive is looked through first, and refused if torch would have to run anything:

- weights and constants must be plain bytes, sample inputs must load with torch.load(weights_only=True);
- symbolic sizes must parse as arithmetic (symbolic_text.py), operators be those of known libraries;
- compiled libraries, scripted objects and archives of torch before 2.8 are not read at all.

What passed is loaded by torch from the very bytes that were looked at, and traced like any other model.
"""

import contextlib
import io
import json
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from qcompile.capture import Boxed, trace
from qcompile.captured import Captured
from qcompile.errors import GraphError
from qcompile.rewrite import Input
from qcompile.saved_graph.symbolic_text import expression
from qcompile.saved_graph.values import NAMESPACES, PYTHON, target_of

PLAIN = ("archive_format", "archive_version", "byteorder", "version", ".format_version", ".storage_alignment")
IMPORTS = ("__enum__", "default_factory_module")  # what torch.utils._pytree imports by name
SUBGRAPHS = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "cond")
KINDS = {
    "PARAMETER": "parameter", "BUFFER": "parameter", "CONSTANT_TENSOR": "parameter", "USER_INPUT": "activation",
}  # fmt: skip


def read_program(path: Path) -> Captured:
    """The program in a .pt2 file, traced for inference. Raises GraphError."""
    try:
        with zipfile.ZipFile(path) as archive:
            checked = _looked_through(archive, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(checked)
        return _captured(program)
    except GraphError:
        raise
    except Exception as error:  # a damaged file may fail anywhere
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise GraphError(f"{path} must be a whole exported program; {reason}; export it again") from None


def _looked_through(archive: zipfile.ZipFile, path: Path) -> io.BytesIO:
    """A new archive of what was looked at: torch's reader might find other things in the old one. Raises GraphError
    for anything that torch would run, or that is not known to be harmless."""
    entries = {name.partition("/")[2]: name for name in archive.namelist()}
    if len(entries) != len(archive.namelist()) or len({n.partition("/")[0] for n in archive.namelist()}) > 1:
        raise GraphError(f"{path} must be a graph saved by qcompile or torch.export.save; it is another archive")
    if not any(name.startswith("models/") for name in entries):
        raise GraphError(f"{path} must be a graph saved by qcompile or torch.export.save; it holds no model")
    checked = io.BytesIO()
    with zipfile.ZipFile(checked, "w", zipfile.ZIP_STORED) as copy:
        for name, whole in sorted(entries.items()):
            data = archive.read(whole)
            _look_at(name, data)
            copy.writestr(f"program/{name}", data)
    checked.seek(0)
    return checked


def _look_at(name: str, data: bytes) -> None:
    if name in PLAIN or name.startswith((".data/", "extra/")):
        return
    if name.startswith("models/") and name.endswith(".json"):
        for key, value in _walk(json.loads(data)):
            _look_at_field(key, value)
    elif name.startswith("data/sample_inputs/"):
        _load_plainly(data, name)
    elif name.endswith("_config.json") and name.startswith(("data/weights/", "data/constants/")):
        for tensor, entry in json.loads(data)["config"].items():
            if entry["use_pickle"] is not False or entry["path_name"].startswith(("custom_obj", "opaque_obj")):
                raise GraphError(f"weights must be plain bytes; {tensor} is pickled, which could run anything")
    elif not name.startswith(("data/weights/weight_", "data/constants/tensor_")):
        raise GraphError(f"a program has a graph, weights and sample inputs; {name} is none of them and is not read")


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    stack = [("", value)]
    while stack:
        key, value = stack.pop()
        yield key, value
        if isinstance(value, str) and value.startswith(("[", "{")):  # call signatures are JSON within JSON
            with contextlib.suppress(ValueError):
                stack.append((key, json.loads(value)))
        elif isinstance(value, dict):
            stack.extend(value.items())
        elif isinstance(value, list):
            stack.extend((key, item) for item in value)


def _look_at_field(key: str, value: Any) -> None:
    if key in IMPORTS:
        raise GraphError(f"a program may not name Python objects to import; its call signature holds {key}")
    if key == "expr_str":
        expression(value)
    elif key in ("target", "as_operator") and isinstance(value, str):
        _look_at_target(value)


def _look_at_target(target: str) -> None:
    parts = target.split(".")
    if target.startswith("torch.ops.higher_order.") and parts[-1] in SUBGRAPHS:
        return
    if parts[:2] == ["torch", "ops"] and parts[2:3] and parts[2] in NAMESPACES:
        target_of(".".join(parts[2:]))
        return
    # Names of arithmetic, and of parameters in the signature, which are no calls.
    if parts[0] in ("_operator", "math", "torch") and (len(parts) != 2 or parts[1] not in PYTHON):
        raise GraphError(f"a program may call operators of {', '.join(NAMESPACES)} and arithmetic; got {target[:80]!r}")
    if target.startswith("#"):
        raise GraphError(f"a program may not bring operators of its own; got {target[:80]!r}")


def _load_plainly(data: bytes, name: str) -> None:
    """torch falls back to unpickling whatever does not load like this."""
    if data:
        try:
            torch.load(io.BytesIO(data), weights_only=True)
        except Exception as error:  # whatever a damaged or hostile file makes of it
            raise GraphError(f"sample inputs must be tensors and plain values; those in {name} are not") from error


def _captured(program: torch.export.ExportedProgram) -> Captured:
    """Trace a program's graph for inference, its inputs named."""
    gm = program.graph_module
    inputs, args = _inputs(program, gm)
    fakes = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    found: list[GraphModule] = []

    def keep(traced: GraphModule) -> Boxed:
        found.append(traced)
        return lambda args: None

    with torch.no_grad():
        trace(gm, fakes, inputs, keep, whole_model=True, already_quantized=False)
    return Captured(found[0], args)


def _inputs(program: torch.export.ExportedProgram, gm: GraphModule) -> tuple[list[Input], list[Any]]:
    """A record for each input, and its value if the program has it. Plain values are constants by now: they go."""
    examples = iter(torch.utils._pytree.tree_leaves(program.example_inputs or ()))
    specs = program.graph_signature.input_specs
    inputs: list[Input] = []
    args: list[Any] = []
    for node, spec in zip(list(gm.graph.find_nodes(op="placeholder")), specs, strict=True):
        kind = KINDS.get(spec.kind.name)
        if kind is None:
            raise GraphError(f"a program's inputs must be tensors; {node.name} is a {spec.kind.name.lower()}")
        value = next(examples, None) if kind == "activation" else _held(program, str(spec.target))
        if not isinstance(node.meta["val"], Tensor):
            if node.users:
                raise GraphError(f"a program's inputs must be tensors; {node.name} is {node.meta['val']!r}")
            gm.graph.erase_node(node)
            continue
        name = node.name if kind == "activation" else str(spec.target)
        inputs.append(Input(kind, name, len(inputs), buffer=spec.kind.name != "PARAMETER" and kind == "parameter"))  # type: ignore[arg-type]
        args.append(value)
    gm.recompile()
    return inputs, args


def _held(program: torch.export.ExportedProgram, name: str) -> Any:
    return program.state_dict.get(name, program.constants.get(name))
