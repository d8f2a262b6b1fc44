"""Which linears of a model can be held in 8 bits: those whose float weight nothing else needs.

A captured graph says what a weight is read by; what a module's code makes of an 8-bit weight is tried in a dry run.
"""

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from qcompile.captured import CODE, Captured
from qcompile.checkpoint.original_names import matrices_of
from qcompile.config import Config
from qcompile.dry_run import must_stay_float
from qcompile.names import module_name
from qcompile.ops import TORCH_DTYPES
from qcompile.pass_pipeline import Pipeline
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears, info_of, is_grouped, linears
from qcompile.quantized_experts import STACKS, why_not_quantized
from qcompile.rewrite import args_of, input_of, module_of, static_nodes, where
from qcompile.validate import relative_error

aten = torch.ops.aten
PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default)
NEARLY_EQUAL = 1e-6  # where a forward computes in float32


def with_linears(captured: Sequence[Captured], config: Config) -> list[Captured]:
    """Captured graphs whose linears are found and described."""
    pipeline = Pipeline((Canonicalize(), FindLinears(config.ignore)))
    return [Captured(pipeline.run(one.graph)[0], one.args) for one in captured]


def unread(model: nn.Module, graphs: Sequence[Captured]) -> dict[str, str]:
    """Linears that no graph of a call has as linears, and why they stay in float."""
    placeholders = [(one, node) for one in graphs for node in one.graph.graph.find_nodes(op="placeholder")]
    read = {id(one.args[input_of(node).index]) for one, node in placeholders if node.users}
    rooted = [(one, info_of(node).parameter) for one in graphs for node in linears(one.graph)]
    described = {id(one.args[parameter]) for one, parameter in rooted if parameter is not None}
    modules = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, _conv1d()))}
    weights = {name: module._parameters.get("weight") for name, module in modules.items()}  # none if parametrized
    whole = "nothing that the example call returns depends on it"
    absent = whole if len(graphs) == 1 else "no graph of the example call reads it"
    return {
        name: "its weight goes into no linear, or under no name" if id(weight) in read else absent
        for name, weight in weights.items()
        if weight is not None and id(weight) not in described
    }


def placeless(model: nn.Module, graphs: Sequence[Captured], config: Config, call: dict[str, Any]) -> dict[str, str]:
    """Linears that the passes would quantize but that no module can hold in 8 bits, by name, and why.

    call: keywords of the call that was captured.
    """
    found: dict[str, str] = {}
    modules: dict[str, nn.Module] = {}
    wanted = [(one, node) for one in graphs for node in linears(one.graph) if info_of(node).quantize]
    weights = {info_of(node).name: one.args[parameter_of(node)] for one, node in wanted}
    needed = _read_otherwise(graphs, {node for _, node in wanted}, weights)
    for one, node in wanted:
        name, weight = info_of(node).name, one.args[parameter_of(node)]
        if is_grouped(node):
            reason = _why_no_stack(model, name, weight, config)
        elif (module := linear_at(model, node, weight)) is None:
            reason = needed[id(weight)] = "its weight is not read by an nn.Linear or Conv1D of its own"
        else:
            modules[name] = module
            reason = _why_not_replaced(module, node)
        if reason:
            found[name] = reason
    found = {name: needed[id(weight)] for name, weight in weights.items() if id(weight) in needed} | found
    fit = {name: module for name, module in modules.items() if name not in found}
    refused = must_stay_float(model, {*fit.values()}, TORCH_DTYPES[config.dtype], call)
    reason = "the model's code depends on the dtype of its weight"
    return found | {name: reason for name, module in fit.items() if module in refused}


def linear_at(model: nn.Module, linear: Node, weight: Tensor) -> nn.Module | None:
    """The module that a linear was written in and that holds its weight, if there is one."""
    written, name = module_of(linear), info_of(linear).name
    for path in dict.fromkeys((written, name)):
        with contextlib.suppress(AttributeError):
            module = model.get_submodule(path)
            own = path == written or _may_begin_inside(linear, written, path, module)
            if own and module._parameters.get("weight") is weight:
                return module
    return None


def _may_begin_inside(linear: Node, written: str, path: str, module: nn.Module) -> bool:
    """Whether what capture says of where a linear was written may be about a module: after a graph break its path
    starts at an inner module; at none, if the module itself was called right after the break."""
    if written:
        return f".{path}".endswith(f".{written}")
    stack = linear.meta.get("nn_module_stack") or {}
    return bool(stack) and next(reversed(stack.values()))[1] is type(module)


def parameter_of(linear: Node) -> int:
    """The index of the captured argument that the weight of a linear, or of a product, is made from."""
    index = info_of(linear).parameter
    assert index is not None
    return index


def _read_otherwise(graphs: Sequence[Captured], wanted: set[Node], weights: Mapping[str, Tensor]) -> dict[int, str]:
    """Weights, by id, that something needs as floats, and what: whatever reads them otherwise than as weights of
    wanted linears. Another module that one is tied to may read it: its own parameter stays what it is."""
    names: dict[int, set[str]] = {}
    for name, weight in weights.items():
        names.setdefault(id(weight), set()).add(name)
    found: dict[int, str] = {}
    for one in graphs:
        static = static_nodes(one.graph)
        for node in one.graph.graph.find_nodes(op="placeholder"):
            record, key = input_of(node), id(one.args[input_of(node).index])
            if key not in names:
                continue
            tied = [f".{module_name(name)}" for name in record.names if module_name(name) not in names[key]]
            for user in _readers(node, static, wanted):
                if not any(tie.endswith(f".{module_of(user) or None}") for tie in tied):
                    found[key] = f"its weight is also read by {where(user)}"
            if record.also_read_by == CODE:
                found[key] = f"its weight is also read by {CODE}"
    return found


def _readers(parameter: Node, static: set[Node], wanted: set[Node]) -> Iterator[Node]:
    """What reads a parameter, or what is computed from parameters, otherwise than as the weight of a wanted linear."""
    stack = [parameter]
    for node in stack:
        for user in node.users:
            if user in static:
                if user.target not in PRODUCTS or not _is_own(user, parameter):  # a linear of zeros is static
                    stack.append(user)
            elif user not in wanted or [i for i, arg in enumerate(args_of(user)) if arg is node] != [1]:
                yield user


def _is_own(product: Node, parameter: Node) -> bool:
    """Whether a product was written in the module that a parameter belongs to."""
    return any(f".{module_name(name)}".endswith(f".{module_of(product) or None}") for name in input_of(parameter).names)


def _why_not_replaced(module: nn.Module, linear: Node) -> str:
    """Why the module of a linear cannot become a QuantizedLinear; empty if it can."""
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return "its module has forward hooks"
    if not is_plain_linear(module):
        return "its weight is not read by an nn.Linear or Conv1D of its own"
    if linear.meta["val"].shape[-1] == 1:
        return "it has one output, which engines that read folders keep in float (a gate)"
    return ""


def _why_no_stack(model: nn.Module, name: str, weight: Tensor, config: Config) -> str:
    """Why a stack of experts cannot be held in 8 bits; empty if it can."""
    owner, _, stack = name.rpartition(".")
    module = model.get_submodule(owner)
    if stack not in STACKS or module._parameters.get(stack) is not weight:
        return "it is not a stack that a module of experts holds"
    if config.activations == "static":
        return "experts have activations per token only"
    if reason := why_not_quantized(module):
        return reason
    if not matrices_of(model, name):
        return "the model's files hold it as one tensor, for which formats have no scales"
    return ""


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes a linear and nothing else: nn.Linear, Conv1D, or a subclass of nn.Linear that spells
    the same forward in its own way, as Falcon's, which its values at random points show."""
    if [*module.buffers()] or type(module).__call__ is not nn.Module.__call__:
        return False
    if type(module).forward in (nn.Linear.forward, _conv1d().forward):
        return True
    alone = isinstance(module, nn.Linear) and not [*module.children()] and {*module._parameters} == {"weight", "bias"}
    return alone and len(inspect.signature(module.forward).parameters) == 1 and _agrees_with_linear(module)


def _conv1d() -> type[nn.Module]:
    """transformers' Conv1D, which exists once transformers is imported."""
    found: type[nn.Module] = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", nn.Linear)
    return found


@torch.no_grad()
def _agrees_with_linear(module: nn.Module) -> bool:
    """Whether a module's forward of random x [..., K] is x · Wᵀ + bias, small or large."""
    parameters = {name: p.double() for name, p in module.named_parameters()}
    weight, bias = parameters["weight"], parameters.get("bias")
    generator = torch.Generator(weight.device).manual_seed(0)
    noise = torch.randn(2, 4, weight.shape[1], generator=generator, device=weight.device, dtype=torch.float64)
    for x in (noise, noise[0], 1e-4 * noise, 1e4 * noise):
        try:
            found = torch.func.functional_call(module, parameters, (x,))
        except Exception:  # whatever its code makes of x
            return False
        expected = nn.functional.linear(x, weight, bias)
        same = isinstance(found, Tensor) and found.shape == expected.shape
        if not same or relative_error(found, expected) > NEARLY_EQUAL:
            return False
    return True
