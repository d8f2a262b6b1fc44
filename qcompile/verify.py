"""The verifier: valid in, valid out, for every pass. Breaking a rule is an error, never a warning."""

import operator
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node

from qcompile import ops
from qcompile.errors import VerifyError
from qcompile.grouped_ops import grouped_linear, scaled_grouped_mm
from qcompile.pass_pipeline import Taken, pass_text
from qcompile.rewrite import args_of, fake_mode_of, input_of, output_of

aten = torch.ops.aten
SMOOTHING = frozenset({ops.smoothing_scale, ops.search_smoothing_scale, ops.power_of_two, ops.rescale})
QUANTIZING = frozenset(
    {ops.quantize, ops.quantize_static, ops.static_scale, ops.clipped_static_scale, ops.concatenate, ops.scaled_mm}
    | {ops.accumulate, ops.from_sums, ops.attention, scaled_grouped_mm}
)
# Legality per stage: which operators of the dialect passes may put into a graph. Those that the modules of an already
# quantized model call are there from the beginning.
FLOAT = frozenset({grouped_linear})
STAGES: dict[str, frozenset[Any]] = {
    "captured": FLOAT,
    "observed": FLOAT | {ops.observe},
    "smoothed": FLOAT | SMOOTHING,
    "quantized": FLOAT | SMOOTHING | QUANTIZING,
    "lowered": frozenset(),
}
QUANTIZED_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
# Ops that only carry 8-bit tensors from where they are made to where they are multiplied.
CARRIERS = (operator.getitem, aten.permute.default, ops.concatenate, ops.scaled_mm)
VIEWS = (
    aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int, aten.t.default,
    aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.select.int,
    aten.alias.default, aten.detach.default,
)  # fmt: skip


class Verify:
    """Observer that checks each pass's result; with `full` it also recomputes every node's metadata."""

    compares = False

    def __init__(self, full: bool) -> None:
        self.full = full
        self.stage = "captured"

    def start(self, gm: GraphModule) -> None:
        self.stage = "captured"
        self._inputs = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        self._outputs = _outputs(gm)
        self._aliases = _aliases(gm)
        self._given = {node.name for node in gm.graph.nodes if node.target in ops.REFERENCES}

    def step(self, taken: Taken) -> None:
        if taken.step.stage != "any":
            self.stage = taken.step.stage
        try:
            self.check(taken.after)
        except VerifyError as error:
            raise VerifyError(f"after pass {pass_text(taken.step)}: {error}") from error.__cause__

    def check(self, gm: GraphModule) -> None:
        """Raises VerifyError with the rule and the node that breaks it."""
        _check_lint(gm)
        self._check_signature(gm)
        for node in gm.graph.nodes:
            _check_value(gm, node)
            _check_mutation(node)
            self._check_stage(node)
        if self.full:
            check_metadata(gm)

    def _check_signature(self, gm: GraphModule) -> None:
        placeholders = list(gm.graph.find_nodes(op="placeholder"))
        kept = [node.name for node in placeholders[: len(self._inputs)]]
        if kept != self._inputs:
            raise VerifyError(f"inputs must stay as they are; {self._inputs} became {kept}")
        for node in placeholders[len(self._inputs) :]:
            if input_of(node).kind != "statistic":
                raise VerifyError(f"only statistics may be added as inputs; {node.name} is {input_of(node).kind}")
        outputs = _outputs(gm)
        count = len(self._outputs)
        if outputs[:count] != self._outputs or (len(outputs) > count and self.stage != "observed"):
            raise VerifyError(f"outputs must keep shape and dtype; {self._outputs} became {outputs}")
        if _aliases(gm)[:count] != self._aliases:
            raise VerifyError("an output must not become an alias of an input, or of another one than before")

    def _check_stage(self, node: Node) -> None:
        is_dialect = node.target in ops.REFERENCES
        if is_dialect and node.target not in STAGES[self.stage] and node.name not in self._given:
            raise VerifyError(f"stage {self.stage} does not allow {node.target}, at {node.name}")
        if node.op != "call_function" or is_dialect or node.target in CARRIERS:
            return
        for operand in node.all_input_nodes:
            if _is_quantized(operand):
                dtype = operand.meta["val"].dtype
                raise VerifyError(f"{dtype} values may only enter the dialect; {node.name} reads {operand.name}")


def _is_quantized(node: Node) -> bool:
    """Whether the dialect made this 8-bit value, on whatever way it came here. A model may have its own."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype not in QUANTIZED_DTYPES:
        return False
    while node.target in CARRIERS and node.target is not operator.getitem:
        node = node.all_input_nodes[0]
    pair = node.args[0] if node.target is operator.getitem else None
    return node.target is ops.quantize_static or (isinstance(pair, Node) and pair.target is ops.quantize)


def _check_lint(gm: GraphModule) -> None:
    try:
        gm.graph.lint()
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise VerifyError(f"the graph is not well-formed: {reason}") from error


def _check_value(gm: GraphModule, node: Node) -> None:
    if node.op == "get_attr":
        try:
            value = operator.attrgetter(str(node.target))(gm)
        except AttributeError:
            raise VerifyError(f"constant {node.target} of node {node.name} does not exist") from None
        if not isinstance(value, torch.Tensor):
            return
    if node.op != "output" and "val" not in node.meta and not _returns_nothing(node):
        raise VerifyError(f"node {node.name} has no metadata value")


def _returns_nothing(node: Node) -> bool:
    """Whether a node is only there for its effect, like _assert_scalar on a size that depends on data."""
    return isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns


def _check_mutation(node: Node) -> None:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return
    written = node.args[0]
    if target is aten.copy_.default and isinstance(written, Node) and written.op == "placeholder":
        return
    raise VerifyError(f"only copy_ into an input may write; {node.name} calls {target}")


def check_metadata(gm: GraphModule) -> None:
    """Recompute every call on fake values; shapes, dtypes and devices must be what the graph says."""
    # Without the Python dispatcher some of torch's own decompositions do not take symbolic sizes.
    with fake_mode_of(gm), enable_python_dispatcher():
        for node in gm.graph.nodes:
            if node.op != "call_function" or node.target is aten.copy_.default or _returns_nothing(node):
                continue
            if any("val" not in operand.meta for operand in node.all_input_nodes):
                continue  # operands that are subgraphs of a higher-order operator
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            try:
                value = node.target(*args, **kwargs)
            except Exception as error:
                reason = str(error).partition("\n")[0]
                raise VerifyError(f"{node.name} must take its arguments; {node.target} says: {reason}") from error
            if _facts(value) != _facts(node.meta["val"]):
                raise VerifyError(
                    f"metadata of {node.name} must be true; it says {_facts(node.meta['val'])}, "
                    f"{node.target} gives {_facts(value)}"
                )


def _facts(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (tuple(map(_size, value.shape)), value.dtype, value.device)
    if isinstance(value, list | tuple):
        return tuple(map(_facts, value))
    return type(value).__name__ if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def _size(size: Any) -> str:
    """A size as text; one that depends on data gets a new name whenever it is computed."""
    return "?" if isinstance(size, torch.SymInt) and size.node.hint is None else str(size)


def _outputs(gm: GraphModule) -> list[Any]:
    results: Any = output_of(gm.graph).args[0]
    return [_facts(node.meta.get("val")) if isinstance(node, Node) else node for node in results]


def _aliases(gm: GraphModule) -> list[str | None]:
    """For each output, the input it is a view of, if it is one."""
    results: Any = output_of(gm.graph).args[0]
    return [_viewed_input(node) if isinstance(node, Node) else None for node in results]


def _viewed_input(node: Node) -> str | None:
    while node.target in VIEWS:
        node = args_of(node)[0]
    return node.name if node.op == "placeholder" else None
