"""find_linears: name every linear, group the ones that read one tensor, and decide which are quantized.

Every `aten.linear` gets `meta["linear"]`, a LinearInfo, and so does every `qcompile.grouped_linear`: a stack of experts
is one linear, named after its parameter. Later passes read that and decide nothing again.

    h = mul(gain, normalized);  q = linear(h, wq);  k = linear(h, wk)
    → q: group 0, norm "model.layers.0.input_layernorm", quantized;  k: group 0, …

Leaves in float, with a Refusal: linears whose name matches an ignore pattern or is one of `keep`, weights that are not
floating point or of another rank, channel counts that are symbolic or zero, weights that are not made from a parameter,
a parameter's second reader with another number of inputs (W and Wᵀ in one model), routers (passes/choices.py), and
every float linear of a model that is already quantized: whoever quantized it left that one out.
"""

import dataclasses
import fnmatch
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from qcompile.grouped_ops import grouped_linear
from qcompile.names import module_name
from qcompile.pass_pipeline import Bound, PassResult
from qcompile.passes.choices import choice_of
from qcompile.rewrite import Refusal, args_of, input_of, is_float, module_of, static_nodes

aten = torch.ops.aten
LINEARS = (aten.linear.default, grouped_linear)
NORMS = (aten.native_layer_norm.default, aten._fused_rms_norm.default)
# torch.nn's inference path: a whole layer as one op, in which no linear is to be seen.
PACKED = (aten._transformer_encoder_layer_fwd.default, aten._native_multi_head_attention.default)
WHY_PACKED = (
    "torch runs this layer as one op; call torch.backends.mha.set_fastpath_enabled(False) before compiling to have its "
    "linears quantized"
)
LARGEST_K = (2**31 - 1) // 127**2  # products of int8 that int32 holds the sum of, whatever they are
SMALL_NORM = 12  # nodes between a norm's input and its gain, in any spelling seen


@dataclasses.dataclass(frozen=True)
class LinearInfo:
    """One linear: its module name (of experts, their parameter's), the index of the parameter its weight [N, K] or
    [E, N, K] is made from (None: no parameter), its group (linears reading the same tensor), the norm that feeds it if
    one does, and whether it is quantized (else the reason)."""

    name: str
    parameter: int | None
    group: int
    norm: str | None
    quantize: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class FindLinears:
    """Name linears, group those that share an input, decide which are quantized."""

    ignore: tuple[str, ...] | list[str] = ("lm_head",)
    keep: tuple[str, ...] | list[str] = ()
    name: ClassVar[str] = "find_linears"
    stage: ClassVar[str] = "captured"
    bound: ClassVar[Bound] = "exact"

    def __post_init__(self) -> None:
        for option in ("ignore", "keep"):
            if isinstance(value := getattr(self, option), str):  # of a pass written out as text
                object.__setattr__(self, option, (value,))

    def run(self, gm: GraphModule) -> PassResult:
        static = static_nodes(gm)
        groups: dict[Node, int] = {}
        widths: dict[Node, int] = {}
        found: list[Node] = []
        given = "the model is already quantized, without this one" if gm.meta.get("already_quantized") else ""
        for node in gm.graph.nodes:
            if node.target in LINEARS and node not in static and node.args[1] in static:
                source = node.args[0]
                group = groups.setdefault(source, len(groups))
                node.meta["linear"] = self._describe(node, group, static, widths, given)
                found.append(node)
        refusals = [
            Refusal(self.name, node.name, f"{info.name}: {info.reason}")
            for node in found
            if not (info := node.meta["linear"]).quantize
        ]
        packed = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in PACKED]
        refusals += [Refusal(self.name, node.name, f"{module_of(node)}: {WHY_PACKED}") for node in packed]
        return PassResult(0, tuple(refusals))

    def _describe(
        self, linear: Node, group: int, static: set[Node], widths: dict[Node, int], refused: str
    ) -> LinearInfo:
        root = root_parameter(args_of(linear)[1])
        name = _name(linear, root) if root is not None else linear.name
        reason = refused or self._refuse(linear, root, name, widths)
        if not reason and (where := choice_of(linear, static)):
            reason = f"its largest outputs are picked in {where}, and a rounding may change the pick"
        return LinearInfo(
            name=name,
            parameter=None if root is None else input_of(root).index,
            group=group,
            norm=_norm_before(args_of(linear)[0], static),
            quantize=not reason,
            reason=reason,
        )

    def _refuse(self, linear: Node, root: Node | None, name: str, widths: dict[Node, int]) -> str:
        weight = args_of(linear)[1].meta["val"]
        called = known_as(name) if is_grouped(linear) else (name,)
        if any(matches(one, tuple(self.ignore)) for one in called):
            return "its name matches an ignore pattern"
        if name in self.keep:
            return "whoever ran this keeps it in float"
        if root is None:
            return "its weight is a constant of the graph, no parameter of the model"
        if not weight.is_floating_point() or not is_float(linear):
            return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not a floating-point type"
        rank = 3 if is_grouped(linear) else 2
        if weight.ndim != rank or not all(isinstance(size, int) and size > 0 for size in weight.shape):
            return f"its weight must be [N, K] with fixed sizes of at least 1, it is {list(weight.shape)}"
        if weight.shape[-1] > LARGEST_K:
            return f"sums over {weight.shape[-1]} int8 products may leave int32; at most {LARGEST_K} do not"
        width = widths.setdefault(root, weight.shape[-1])
        if width != weight.shape[-1]:
            return f"statistics are kept by parameter, and its parameter also serves a linear with {width} inputs"
        return ""


def _name(linear: Node, root: Node) -> str:
    """The module that a linear belongs to: of a tied parameter's owners, the one in whose forward it was written.
    Experts are several parameters of one module, so they go by the parameter."""
    if is_grouped(linear):
        return input_of(root).name
    owners = [module_name(name) for name in input_of(root).names]
    written = f".{module_of(linear)}"
    # After a graph break the path starts at an inner module; a wrapper adds to its front.
    return next((o for o in owners if written.endswith(f".{o}") or f".{o}".endswith(written)), owners[-1])


def known_as(parameter: str) -> tuple[str, str]:
    """What an ignore pattern may call a parameter: its module, or, as one of several experts', itself."""
    return module_name(parameter), parameter


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a module name, or any dotted tail of it, matches one of the glob patterns."""
    tails = [name.split(".", i)[-1] for i in range(name.count(".") + 1)]
    return any(fnmatch.fnmatchcase(tail, pattern) for pattern in patterns for tail in tails)


def root_parameter(weight: Node) -> Node | None:
    """The parameter a weight expression is made from: the largest of rank 2 or more among its ancestors."""
    candidates = [node for node in parameters_in(weight) if node.meta["val"].ndim >= 2]
    return max(candidates, key=lambda node: node.meta["val"].numel(), default=None)


def parameters_in(static: Node) -> list[Node]:
    """The parameters among a static expression's ancestors (itself included)."""
    stack, seen, found = [static], {static}, []
    while stack:
        node = stack.pop()
        if node.op == "placeholder" and input_of(node).kind == "parameter":
            found.append(node)
        fresh = [operand for operand in node.all_input_nodes if operand not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return found


def linears(gm: GraphModule) -> list[Node]:
    """Every linear that find_linears described, experts among them, in graph order."""
    return [node for node in gm.graph.nodes if node.target in LINEARS and "linear" in node.meta]


def is_grouped(linear: Node) -> bool:
    """Whether a linear is a stack of experts, weight [E, N, K]."""
    return linear.target is grouped_linear


def bias_of(linear: Node) -> Node | None:
    """The bias [N] of a linear, if it has one. Experts' is a sum of its own."""
    return None if is_grouped(linear) else (*args_of(linear), None)[2]


def info_of(node: Node) -> LinearInfo:
    info: LinearInfo = node.meta["linear"]
    return info


def _norm_before(x: Node, static: set[Node]) -> str | None:
    """The module name of the norm whose gain makes x, whatever its spelling; None if x is no norm's output."""
    node = x
    while node.op == "call_function" and (_is_cast(node) or _adds_bias(node, static)):
        node = next(operand for operand in node.all_input_nodes if operand not in static)
    if node.op != "call_function":
        return None
    if node.args and isinstance(node.args[0], Node) and node.args[0].target in NORMS:
        return module_of(node.args[0])
    if node.target is aten.mul.Tensor and any(operand in static for operand in node.all_input_nodes):
        return module_of(node) if _reads_rsqrt(node) else None
    return None


def _is_cast(node: Node) -> bool:
    return node.target in (torch.ops.prims.convert_element_type.default, aten._to_copy.default)


def _adds_bias(node: Node, static: set[Node]) -> bool:
    operands = node.all_input_nodes
    return node.target is aten.add.Tensor and len(operands) == 2 and sum(o in static for o in operands) == 1


def _reads_rsqrt(node: Node) -> bool:
    seen: list[Node] = [node]
    for current in seen:
        if current.target in (aten.rsqrt.default, aten.sqrt.default):
            return True
        if len(seen) < SMALL_NORM:
            seen.extend(current.all_input_nodes)
    return False
