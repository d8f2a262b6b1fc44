"""The only door to graph mutation: nodes that know their value, their pass and the node they came from."""

import dataclasses
import operator
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qcompile import ops
from qcompile.calibration import Field

RESHAPES = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default)
INHERITED_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "linear", "smoothing")


@dataclasses.dataclass(frozen=True)
class Input:
    """What a placeholder stands for.

    kind: "activation" is data of one call (symbolic sizes too), "parameter" belongs to the model, "statistic" is
    what calibration knows of the input of the linear whose weight parameter is the placeholder at index `of`.
    index: position among the captured graph's arguments; statistics follow them.
    field: which statistic, "absmax" [K] or "rows" [R, K]. aliases: further names of a tied parameter.
    buffer: a part of the model that is no nn.Parameter (a mask, a table), which absorbs no scale.
    also_read_by: who reads a parameter beside this graph, so that it cannot be scaled in place; empty if nobody does.
    fixed: data that the caller promises to keep in one place (a static KV cache), which CUDA graphs may thus write to.
    """

    kind: Literal["activation", "parameter", "statistic"]
    name: str
    index: int
    of: int | None = None
    field: Field = "absmax"
    aliases: tuple[str, ...] = ()
    buffer: bool = False
    also_read_by: str = ""
    fixed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All names of a parameter."""
        return (self.name, *self.aliases)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a rule left a node alone: one sentence, and the node it is about."""

    rule: str
    node: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Origin:
    """Which pass created a node, in place of which node of the graph before it."""

    by: str
    of: str


def input_of(node: Node) -> Input:
    record: Input = node.meta["input"]
    return record


def output_of(graph: Graph) -> Node:
    output: Node = next(iter(graph.find_nodes(op="output")))
    return output


def args_of(node: Node) -> tuple[Any, ...]:
    """A node's positional arguments, untyped."""
    return node.args


def copy_graph(gm: GraphModule) -> GraphModule:
    """A graph module that can be edited without touching `gm`; node metadata and constants are shared."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    result = graph.graph_copy(gm.graph, mapping)
    old_output = output_of(gm.graph)
    output = graph.output(result)
    output.meta = dict(old_output.meta)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    copied = GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    return copied


def fake_mode_of(gm: GraphModule) -> torch._subclasses.FakeTensorMode:
    for node in gm.graph.nodes:
        if isinstance(node.meta.get("val"), torch._subclasses.FakeTensor):
            mode: torch._subclasses.FakeTensorMode = node.meta["val"].fake_mode
            return mode
    return torch._subclasses.FakeTensorMode()


def fake_value(gm: GraphModule, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The metadata value of calling target on nodes: runs it on their fake values."""
    fake_args, fake_kwargs = torch.fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
    with fake_mode_of(gm), enable_python_dispatcher():  # without it, torch 2.11 takes no symbolic sizes
        return target(*fake_args, **fake_kwargs)


class Rewriter:
    """Edits one graph on behalf of one pass; counts what it did."""

    def __init__(self, gm: GraphModule, by: str) -> None:
        self.gm, self.by, self.changes = gm, by, 0

    def emit(
        self,
        target: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        before: Node,
        of: Node,
        name: str,
    ) -> Node:
        """A new call node ahead of `before`, standing in for (part of) `of`."""
        keywords = dict(kwargs or {})
        with self.gm.graph.inserting_before(before):
            node = self.gm.graph.create_node("call_function", target, args, keywords, name)
        node.meta = {key: of.meta[key] for key in INHERITED_META if key in of.meta}
        node.meta["val"] = fake_value(self.gm, target, args, keywords)
        node.meta["origin"] = Origin(self.by, of.name)
        self.changes += 1
        return node

    def item(self, node: Node, index: int, *, before: Node, name: str) -> Node:
        """The index-th result of a node that returns a tuple."""
        return self.emit(operator.getitem, (node, index), before=before, of=node, name=name)

    def constant(self, value: Tensor, *, before: Node, name: str) -> Node:
        """A tensor that the graph carries with it."""
        attribute = _fresh(name, lambda candidate: hasattr(self.gm, candidate))
        self.gm.register_buffer(attribute, value, persistent=False)
        with self.gm.graph.inserting_before(before):
            node = self.gm.graph.get_attr(attribute)
        fake_mode = fake_mode_of(self.gm)
        node.meta["val"] = fake_mode.from_tensor(value, static_shapes=True)
        node.meta["origin"] = Origin(self.by, before.name)
        self.changes += 1
        return node

    def statistic(self, weight: Node, channels: int, field: Field = "absmax") -> Node:
        """The placeholder for what calibration knows of the input of linears that use the parameter `weight`:
        absmax [channels] or rows [R, channels], float32."""
        record = input_of(weight)
        placeholders: list[Node] = list(self.gm.graph.find_nodes(op="placeholder"))
        for node in placeholders:
            if (known := input_of(node)).kind == "statistic" and (known.of, known.field) == (record.index, field):
                return node
        with self.gm.graph.inserting_after(placeholders[-1]):
            node = self.gm.graph.placeholder(f"{field}_{len(placeholders)}")
        node.meta["input"] = Input("statistic", record.name, len(placeholders), record.index, field)
        shape = (channels,) if field == "absmax" else (ops.SAMPLED_ROWS, channels)
        with fake_mode_of(self.gm):
            node.meta["val"] = weight.meta["val"].new_empty(shape, dtype=torch.float32)
        return node

    def replace(self, old: Node, new: Node) -> None:
        """Every user of `old` reads `new` instead; `old` goes."""
        old.replace_all_uses_with(new)
        self.gm.graph.erase_node(old)
        self.changes += 1

    def set_input(self, user: Node, old: Node, new: Node) -> None:
        """One user reads `new` where it read `old`."""
        user.replace_input_with(old, new)
        self.changes += 1


def _fresh(name: str, taken: Callable[[str], bool]) -> str:
    suffix = 0
    while taken(f"{name}_{suffix}"):
        suffix += 1
    return f"{name}_{suffix}"


def static_nodes(gm: GraphModule) -> set[Node]:
    """Nodes whose value depends on the model alone: parameters, constants, statistics, and what is computed
    from them. Their values are computed once per set of weights, not once per call. What depends on nothing at all (a
    mask made of arange) is among them only if they are computed with it, as in a weight times its lower triangle."""
    static: set[Node] = set()
    created: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if input_of(node).kind != "activation":
                static.add(node)
        elif node.op == "get_attr":
            static.add(node)
        elif node.op == "call_function":
            operands = node.all_input_nodes
            if is_pure(node) and all(operand in static or operand in created for operand in operands):
                (static if any(operand in static for operand in operands) else created).add(node)
    for node in reversed(gm.graph.nodes):
        if node in static:
            static.update(operand for operand in node.all_input_nodes if operand in created)
    return static


def raise_static(gm: GraphModule) -> None:
    """Move static nodes above everything else, so that any of them can be used anywhere."""
    static = static_nodes(gm)
    top = list(gm.graph.find_nodes(op="placeholder"))[-1]
    for node in list(gm.graph.nodes):
        if node in static and node.op != "placeholder":
            top.append(node)
            top = node


def is_pure(node: Node) -> bool:
    """Whether a call writes nothing and yields the same each time."""
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    return not node.is_impure()


def eliminate_unused(gm: GraphModule) -> int:
    """Erase call and get_attr nodes that nobody reads and that write nothing. Returns how many went."""
    erased = 0
    for node in reversed(list(gm.graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users and not node.is_impure():
            gm.graph.erase_node(node)
            erased += 1
    return erased


def is_view(node: Node) -> bool:
    """Whether a node's value shares its operand's memory, or is an element of its operand."""
    if node.target in (operator.getitem, torch.ops.aten._unsafe_view.default):
        return True
    schema = getattr(node.target, "_schema", None)
    aliases = [value.alias_info for value in schema.returns] if schema is not None else []
    return any(alias is not None and not alias.is_write for alias in aliases)


def is_symbolic(node: Node) -> bool:
    """Whether a value is a symbolic size, or a tensor that has one."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return any(not isinstance(size, int) for size in (*value.shape, *value.stride()))
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def operands_in(arguments: Any) -> list[Node]:
    """Nodes in nested arguments, in order of appearance, repeated ones included."""
    found: list[Node] = []
    torch.fx.node.map_arg(arguments, found.append)
    return found


def operands_of(node: Node) -> list[Node]:
    """As `operands_in`, of a node's own arguments."""
    return operands_in((node.args, node.kwargs))


def value_kind(value: Any) -> Hashable:
    """What code is compiled for: size, layout, dtype and device of a tensor, a symbolic size's expression, else the
    type. The same for a list of values, one by one."""
    if isinstance(value, tuple | list):
        return tuple(map(value_kind, value))
    if isinstance(value, Tensor):
        sizes = (*value.shape, *value.stride())
        return tuple(map(str, sizes)), value.dtype, value.device, value.layout
    return str(value) if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else type(value).__name__


def is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def equal(left: Any, right: Any) -> bool:
    """Whether two sizes are the same whatever symbols stand for; asking installs no guard."""
    return statically_known_true(left == right)


def same(values: Iterable[object]) -> bool:
    return len(set(values)) <= 1


def shape_of(node: Node) -> tuple[int, ...]:
    """A tensor's shape with symbolic sizes at their hints."""
    return tuple(hint(size) for size in node.meta["val"].shape)


def hint(size: Any) -> int:
    """A size as a number: a symbolic one at the value it had in the example."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint or 0)
    return int(size)


def module_of(node: Node) -> str:
    """The module in whose forward a node was written, as a dotted path; empty if capture did not record it."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    inside = re.sub(r"^L\['[^']*'\]", "", path)  # the compiled function's local that holds the model
    # Where a class has a __getattr__ of its own, as in diffusers and PEFT, Dynamo says how nn.Module's finds it.
    inside = re.sub(r"(\.__dict__\['_modules'\]|\._modules)(?=\[)", "", inside)
    return re.sub(r"\['?([^\]']+)'?\]", r".\1", inside).lstrip(".")


def where(node: Node) -> str:
    """The op and the module it was written in, for messages."""
    op = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
    module = module_of(node)
    return f"{op} in {module}" if module else f"{op} ({node.name})"
