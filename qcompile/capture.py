"""Capture: from Dynamo's graph to functional ATen for inference, with every input named."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes

from qcompile import names, ops
from qcompile.captured import Captured, ReadsOutside, named_after, with_other_readers
from qcompile.errors import CaptureError, GradientError, QCompileError
from qcompile.grouped_ops import scaled_grouped_mm
from qcompile.quantized_linear import is_quantized
from qcompile.rewrite import Input

aten = torch.ops.aten
Boxed = Callable[[list[Any]], Any]
Build = Callable[[GraphModule], Boxed]

# Kept whole: as single nodes the passes recognise them, and explain reads better. Inductor's own decompositions for
# small matrix products would also hide linears whenever M = 1. Lowering decomposes them at the end.
KEPT = (
    "mm", "addmm", "bmm", "baddbmm", "linear", "native_layer_norm", "_fused_rms_norm", "silu", "gelu", "_softmax",
    "relu",
)  # fmt: skip

# What Dynamo can be asked to follow, most likely to give one graph first.
FOLLOWING: tuple[dict[str, Any], ...] = (
    {"capture_scalar_outputs": True},
    {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True},
    {},
)
# Where graphs break, code that models share (transformers' decorators) is compiled for each; beyond Dynamo's limit of 8
# it, and all that it calls, would run uncompiled: unseen.
UNLIMITED: dict[str, Any] = {"recompile_limit": 2**16, "accumulated_recompile_limit": 2**16}


def capture(gm: GraphModule, example_inputs: Sequence[Any], build: Build) -> Callable[..., Any]:
    """Trace gm for inference and have `build` make the callable that runs the traced graph.

    The traced graph's placeholders carry an Input record each. Calls that require gradients raise GradientError.
    """
    inputs, facts = look(gm, example_inputs)
    return trace(gm, example_inputs, inputs, build, **facts)


def look(gm: GraphModule, example_inputs: Sequence[Any]) -> tuple[list[Input], dict[str, bool]]:
    """What the inputs of one of Dynamo's graphs are, and facts about the model that is being called."""
    model = names.calling_model()
    if model is not None:
        names.register(model)
    inputs = describe_inputs(gm, example_inputs)
    whole = _is_whole(model, example_inputs, inputs)
    quantized = is_quantized(model) if model is not None else _has_quantized(gm)
    return inputs, {"whole_model": whole, "already_quantized": quantized}


def _has_quantized(gm: GraphModule) -> bool:
    """Whether a graph, of a model that a function of the user's calls, has products of 8-bit weights."""
    products = ops.scaled_mm.overloadpacket, scaled_grouped_mm.overloadpacket
    return any(node.target in products for node in gm.graph.nodes)


def trace(
    gm: GraphModule, example_inputs: Sequence[Any], inputs: list[Input], build: Build, **facts: object
) -> Callable[..., Any]:
    """The same, for a graph whose inputs are known. facts: what the traced graph's meta will say."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch import config as functorch_config
    from torch._guards import detect_fake_mode
    from torch._inductor.virtualized import V

    def inference(traced: GraphModule, fakes: Sequence[Any]) -> Boxed:
        _annotate(traced, inputs, fakes)
        traced.meta.update(facts, around=_around())
        # AOTAutograd calls this under its fake mode; passes make real constants too.
        with _disable_current_modes():
            return build(traced)

    with (
        V.set_fake_mode(detect_fake_mode(list(example_inputs))),
        functorch_config.patch(unlift_effect_tokens=True),
    ):
        return aot_autograd(
            fw_compiler=_no_gradients,
            # A plain function: AOTAutograd's cache then keeps no entry that stock Inductor could hit.
            inference_compiler=inference,
            decompositions=_decompositions(),
            keep_inference_input_mutations=True,
        )(gm, example_inputs)


@dataclasses.dataclass(frozen=True)
class Around:
    """What AOTAutograd does around a call of a traced graph: it counts writes to arguments (`written`, by position) and
    returns arguments themselves for outputs that are nothing else (`returned`, pairs of output and argument)."""

    written: tuple[int, ...] = ()
    returned: tuple[tuple[int, int], ...] = ()


def _around() -> Around | None:
    """Around the graph that is being compiled; None if AOTAutograd does more."""
    from torch._functorch._aot_autograd.schemas import OutputType
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is None or context.fw_metadata is None or context.guards_context.aotautograd_guards:
        return None
    found = context.fw_metadata
    more = (
        found.num_mutated_inp_runtime_indices, found.num_intermediate_bases, found.tokens,
        found.num_outputs_rng_offset, found.num_graphsafe_rng_states, found.grad_enabled_mutation is not None,
    )  # fmt: skip
    outputs = enumerate(found.output_info)
    aliased = [(index, output) for index, output in outputs if output.output_type is not OutputType.non_alias]
    if any(more) or any(output.output_type is not OutputType.is_input for _, output in aliased):
        return None
    returned = tuple((index, output.base_idx) for index, output in aliased if output.base_idx is not None)
    return Around(tuple(found.mutated_graph_handled_indices_seen_by_autograd), returned)


def without_trace(call: Boxed, around: Around) -> Callable[..., Any]:
    """What `trace` would return for a graph that was compiled in an earlier process."""
    amp = torch._C._is_any_autocast_enabled()

    def run(*args: Any) -> Any:
        torch.autograd.graph.increment_version([args[index] for index in around.written])
        with torch.no_grad(), torch._C._DisableAutocast() if amp else contextlib.nullcontext():
            results = list(call(list(args)))
        for output, argument in around.returned:
            results[output] = args[argument]
        return results

    compiled: Callable[..., Any] = torch.compiler.disable(run, reason="a compiled graph")  # type: ignore[no-untyped-call]
    return compiled


def capture_call(model: nn.Module, arguments: Mapping[str, Any], *, dynamic: bool = False) -> list[Captured]:
    """Run one call of `model` and return every graph it went through (one, unless Dynamo breaks the graph), as often as
    it did, inputs named after the parameters of that time.

    Leaves no compiled code behind on the model. Raises CaptureError or GradientError.
    """
    names.register(model)
    found: list[Captured] = []

    def keep(traced: GraphModule) -> Boxed:
        def call(args: list[Any]) -> Any:
            found.append(Captured(named_after(traced, args), list(args)))
            with _disable_current_modes():
                return traced(*args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            return capture(gm, example_inputs, keep)
        except QCompileError as error:
            return raising(error)

    with torch.no_grad(), leaving_no_code(), ReadsOutside() as outside:
        compiled_call(model, backend, dynamic=dynamic)(**arguments)
    captured = with_other_readers(found, outside)
    found.clear()  # Dynamo may keep the backend, and with it the arguments
    return captured


def capture_in_fewest_graphs(model: nn.Module, arguments: Mapping[str, Any]) -> list[Captured]:
    """As `capture_call`, with what data decides in the graph, where Dynamo can follow it: numbers read from tensors,
    then sizes too, which fails in some models. Several tries also help where a model's first call breaks for things
    that it does once (transformers installs hooks).

    Such graphs are for analysis: torch.compile makes them only if torch._dynamo.config says so. Raises CaptureError,
    GradientError, and whatever the model raises.
    """
    found: list[list[Captured]] = []
    for settings in FOLLOWING:
        try:
            with torch._dynamo.config.patch(settings):
                found.append(capture_call(model, arguments))
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException):
            if not settings and not found:  # not about what was followed
                raise
            continue
        if len(found[-1]) == 1:
            return found[-1]
    return min(found, key=len)


def compiled_call(model: nn.Module, backend: Callable[..., Any], *, dynamic: bool | None = None) -> Callable[..., Any]:
    """The model's call compiled in a code object of its own: Dynamo counts compilations per code object, and the
    user's own calls of the model keep theirs. Takes keyword arguments."""

    def call(**arguments: Any) -> Any:
        return model(**arguments)

    call.__code__ = call.__code__.replace(co_name=f"call_{id(backend)}")
    compiled = torch.compile(call, backend=backend, dynamic=dynamic)

    def run(**arguments: Any) -> Any:
        # Parts of the model that the user compiled for another backend are looked at too.
        with torch._dynamo.config.patch(UNLIMITED), torch.compiler.set_stance("default", force_backend=backend):
            return compiled(**arguments)

    return run


@contextlib.contextmanager
def leaving_no_code() -> Iterator[None]:
    """Around compiled calls for analysis: where graphs break, they compile code that the user's calls share, up to a
    limit. Code that hit it before would run uncompiled, with all that it calls, so it is compiled anew; and what was
    compiled inside is dropped, or it would count when the user's calls are compiled. Dynamo's advice on graph breaks is
    kept back: nobody can follow it here."""
    log = logging.getLogger("torch._dynamo")
    level = log.level
    if log.getEffectiveLevel() == logging.WARNING:  # unless the user asked for more
        log.setLevel(logging.ERROR)
    _drop({code: count for code, count in _compilations().items() if count >= torch._dynamo.config.recompile_limit})
    before = _compilations()
    try:
        yield
    finally:
        log.setLevel(level)
        _drop({code: count for code, count in _compilations().items() if count > before.get(code, 0)})


def _compilations() -> dict[CodeType, int]:
    """How often each code object that Dynamo has seen is compiled."""
    seen = [reference() for reference in torch._dynamo.convert_frame.input_codes.seen]
    entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list
    return {code: len(entries(code)) for code in seen if code is not None}


def _drop(codes: Iterable[CodeType]) -> None:
    for code in codes:
        torch._C._dynamo.eval_frame.reset_code(code)


def describe_inputs(gm: GraphModule, example_inputs: Sequence[Any]) -> list[Input]:
    """What each of Dynamo's graph inputs is, under the user's names."""
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    return [
        _describe(index, node, value)
        for index, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True))
    ]


def _is_whole(model: nn.Module | None, example_inputs: Sequence[Any], inputs: list[Input]) -> bool:
    """Whether a graph holds every parameter of the model, and so is no fragment between graph breaks."""
    if model is None:
        return any(record.kind == "parameter" for record in inputs)
    present = {id(value) for value in example_inputs}
    own: list[torch.Tensor] = [*model.parameters()] or [*model.buffers()]
    return bool(own) and all(id(tensor) in present for tensor in own)


def _describe(index: int, node: Node, value: object) -> Input:
    source = _source(node)
    if not names.is_static(value, source):
        marked = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")  # torch._dynamo.mark_static_address
        return Input("activation", node.name, index, fixed=marked is not None)
    registered = names.names_of(value) if isinstance(value, torch.Tensor) else ()
    name, *aliases = registered or (names.source_name(source) or node.name,)
    return Input("parameter", name, index, aliases=tuple(aliases), buffer=not isinstance(value, nn.Parameter))


def _source(node: Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def _annotate(traced: GraphModule, inputs: list[Input], fakes: Sequence[Any]) -> None:
    placeholders = list(traced.graph.find_nodes(op="placeholder"))
    if len(placeholders) != len(inputs):
        raise CaptureError(
            f"every graph input must arrive as it was passed; {len(inputs)} became {len(placeholders)}; inputs that "
            "are views of one another, or tensor subclasses, are not supported"
        )
    written = {n.args[0] for n in traced.graph.find_nodes(op="call_function", target=aten.copy_.default)}
    for node, record, fake in zip(placeholders, inputs, fakes, strict=True):
        node.meta.setdefault("val", fake)
        if node in written and record.kind == "parameter":
            record = Input("activation", record.name, record.index)
        node.meta["input"] = record


def _decompositions() -> dict[Any, Callable[..., Any]]:
    import torch._inductor.lowering  # some decompositions refer to it by name
    from torch._inductor.decomposition import select_decomp_table

    table = dict(select_decomp_table())
    for op in list(table):
        if isinstance(op, torch._ops.OpOverload) and op._schema.name.removeprefix("aten::") in KEPT:
            del table[op]
    return table


def _no_gradients(gm: GraphModule, example_inputs: Sequence[Any]) -> Boxed:
    return raising(
        GradientError(
            "w8a8 runs inference only; this call requires gradients; wrap it in torch.no_grad() or freeze the "
            "parameters with model.requires_grad_(False)"
        )
    )


def raising(error: Exception) -> Boxed:
    """A compiled function that raises: the caller sees one plain error where Dynamo would wrap it in pages."""

    def call(*args: Any) -> Any:
        raise error.with_traceback(None)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call
