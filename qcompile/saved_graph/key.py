"""What decides how a graph is compiled, as a digest: equal keys in two processes mean equal compiled graphs.

Hashed are Dynamo's graph, the inputs with their names, options, the machine, the versions and sources of torch and
qcompile, and the settings of torch that capture or lowering reads. Values of weights and statistics are left out:
no pass looks at them. A graph gets no key if something in it has no text that says all about it, such as a function
outside torch, or a size that is symbolic.
"""

import functools
import hashlib
import importlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import _get_qualified_name

import qcompile
import qcompile.lowering
import qcompile.passes
from qcompile.rewrite import Input, module_of
from qcompile.saved_graph.values import LOWERED
from qcompile.versions import installed

PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
SOURCES = (".py", ".h", ".cpp", ".json")
PACKAGES = ("torch", "_operator", "math", "builtins")  # whose functions change with a version only
TENSORS = (Tensor, nn.Parameter, nn.Buffer, torch._subclasses.FakeTensor)


class NoKey(Exception):
    """Why a graph has none."""


def key_of(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    inputs: Sequence[Input],
    facts: Mapping[str, object],
    settings: Sequence[object],
) -> str:
    """The key of one of Dynamo's graphs. facts, settings: whatever else decides, with a repr that says all. Raises
    NoKey."""
    hasher = hashlib.blake2b(digest_size=16)
    parts = (_graph(gm), _inputs(example_inputs), repr(list(inputs)), repr(dict(facts)), repr(list(settings)))
    for part in (*parts, _state(), _versions()):
        hasher.update(part.encode() + b"\0")
    return hasher.hexdigest()


def _graph(gm: GraphModule) -> str:
    return "\n".join(_node(gm, node) for node in gm.graph.nodes)


def _node(gm: GraphModule, node: Node) -> str:
    if node.op == "get_attr":
        target = _constant(functools.reduce(getattr, str(node.target).split("."), gm))
    elif node.op == "call_function":
        target = _function(node.target)
    elif node.op == "call_module":
        raise NoKey(f"calls the module {node.target}")
    else:
        target = str(node.target)
    # Of the modules that share a parameter, the one in whose forward a linear is written gives it its name.
    return f"{node.name} = {node.op} {target} {_text(node.args)} {_text(node.kwargs)} in {module_of(node)!r}"


def _constant(value: Any) -> str:
    if isinstance(value, GraphModule):
        return f"[{_graph(value)}]"
    if type(value) not in TENSORS[:3] or value.is_meta or value.layout != torch.strided:
        raise NoKey(f"holds a {type(value).__name__}")
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{_tensor(value)} {hashlib.blake2b(data, digest_size=16).hexdigest()}"


def _function(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        name = str(target)
        if name.partition(".")[0] not in LOWERED:
            raise NoKey(f"calls {name}, whose meaning no version decides")
        return name
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target._name}"
    try:
        name = _get_qualified_name(target)
        name = name if "." in name else f"builtins.{name}"  # getattr
        root, *path = name.split(".")
        found = functools.reduce(getattr, path, importlib.import_module(root)) if root in PACKAGES else None
    except (AttributeError, ImportError, RuntimeError):
        found = None
    if found is not target:
        raise NoKey(f"calls {target}, which torch does not have under its name")
    return name


def _text(value: Any) -> str:
    """An argument of a node."""
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, PLAIN):
        return repr(value)
    if value is Ellipsis:
        return "..."
    if isinstance(value, slice):
        return f"slice{_text([value.start, value.stop, value.step])}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_text(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(_text, value))})"
    raise NoKey(f"has an argument of type {type(value).__name__}")


def _inputs(example_inputs: Sequence[Any]) -> str:
    """Types, and which tensors share memory."""
    memories: dict[int, int] = {}
    found = []
    for value in example_inputs:
        if type(value) not in TENSORS or value.layout != torch.strided:
            raise NoKey(f"takes a {type(value).__name__}")
        memory = memories.setdefault(value.untyped_storage()._cdata, len(memories))
        found.append(f"{_tensor(value)} in {memory}")
    return "\n".join(found)


def _tensor(value: Tensor) -> str:
    sizes = [*value.shape, *value.stride(), value.storage_offset()]
    if any(not isinstance(size, int) for size in sizes):
        raise NoKey("has symbolic sizes")
    flags = [value.requires_grad, value.is_inference(), value.is_conj(), value.is_neg(), value.is_leaf]
    return f"{value.dtype} {value.device} {value.dim()} {sizes} {flags}"


def _state() -> str:
    """Settings of torch that are not part of a graph."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config

    autocast = {kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}
    switches = [
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(), _precision(), sorted(autocast.items()),
        torch._C._get_flash_sdp_enabled(), torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(), torch._C._get_cudnn_sdp_enabled(),
    ]  # fmt: skip
    return repr((switches, _portable(inductor_config), _portable(functorch_config)))


def _precision() -> tuple[str, ...]:
    """Of products of float32 matrices. Settings by backend have no common name, and asking for it is then an error."""
    try:
        return (torch.get_float32_matmul_precision(),)
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]


def _portable(config: Any) -> list[tuple[str, str]]:
    return sorted((key, repr(value)) for key, value in config.save_config_portable().items())


@functools.cache
def _versions() -> str:
    """Of Python and of packages whose operators graphs call, and every line of qcompile."""
    hasher = hashlib.blake2b(digest_size=16)
    for package in (qcompile, qcompile.passes, qcompile.lowering):
        for folder in package.__path__:
            for file in sorted(Path(folder).rglob("*")):
                if file.suffix in SOURCES:
                    hasher.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    versions = [platform.python_version(), torch.__version__, torch.version.git_version, installed("transformers")]
    return " ".join([*map(str, versions), hasher.hexdigest()])
