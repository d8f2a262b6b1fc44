"""Qualified names of parameters, as the user's model spells them.

A backend sees parameters as anonymous graph inputs. Dynamo's source says where it found each one, but after a graph
break that path starts at some inner module; the model being called is then found on the call stack.
"""

import itertools
import re
import sys
import weakref
from types import FrameType

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

_names: dict[int, tuple["weakref.ref[Tensor]", tuple[str, ...]]] = {}


def register(model: nn.Module) -> None:
    """Remember the qualified names of every parameter and buffer of `model`, weakly. Tied ones have several."""
    found: dict[int, tuple[Tensor, list[str]]] = {}
    tensors = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    for name, tensor in itertools.chain(*tensors):
        found.setdefault(id(tensor), (tensor, []))[1].append(name)
    for key, (tensor, names) in found.items():
        _names[key] = (weakref.ref(tensor, lambda _, key=key: _names.pop(key, None)), tuple(names))  # type: ignore[misc]


def name_of(tensor: Tensor) -> str | None:
    """The (first) registered name of this very tensor object, or None."""
    return next(iter(names_of(tensor)), None)


def names_of(tensor: Tensor) -> tuple[str, ...]:
    """Every registered name of this very tensor object: a head tied to an embedding has two."""
    reference, names = _names.get(id(tensor), (None, ()))
    return names if reference is not None and reference() is tensor else ()


def original(model: nn.Module) -> nn.Module:
    """The model behind the wrapper that torch.compile puts around it."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def calling_model() -> nn.Module | None:
    """The model whose call led here: the compiled module nearest on the stack, else the outermost module."""
    outermost: nn.Module | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name in _CALLS else None
        if isinstance(owner, OptimizedModule):
            return owner._orig_mod
        if isinstance(owner, nn.Module):
            outermost = owner
        frame = frame.f_back
    return outermost


_CALLS = {"_call_impl", "_wrapped_call_impl", "__call__"}


def source_name(source: str) -> str | None:
    """The dotted path in a Dynamo source such as L['self']._modules['fc']._parameters['weight']."""
    parts = re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", source)
    return ".".join(parts) or None


def module_name(parameter: str) -> str:
    """The module that owns a parameter: "layers.0.fc.weight" → "layers.0.fc"."""
    return re.sub(r"(\.parametrizations\.[^.]+\.original\d*|\.[^.]+)$", "", parameter)


def is_static(tensor: object, source: str) -> bool:
    """Whether a graph input is part of the model (a parameter or buffer) and not data of one call."""
    if isinstance(tensor, nn.Parameter):
        return not re.fullmatch(r"L\['\w+'\]", source)  # a Parameter may also be what the caller passes
    return isinstance(tensor, torch.Tensor) and "._buffers[" in source
