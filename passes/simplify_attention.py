"""simplify_attention: attention says what it sees, instead of being shown it.

    mask = where(arange(L)[:, None] >= arange(S), 0, -inf);  k = view(clone(expand(unsqueeze(key, 2), …)), …)
    y, _ = _scaled_dot_product_efficient_attention(q, k, v, mask, …)   →   y = attention(q, key, value, None, causal)

While a model is traced it cannot know that a mask hides nothing, or only the future, and writes it out; it repeats keys
for the query heads that share them, since kernels with masks ask for that. Kernels that need neither are several times
faster, and read a fraction of the memory.

Applies to torch's attention operators, whatever device chose them, if there is no dropout and only the result is read.
A mask that depends on sizes alone is computed here and compared, unless a size is symbolic or it has more than LARGEST
elements: one that hides nothing goes, one that hides the future becomes is_causal, and keys behind the last query are
cut off. Other masks stay, without padding and copies; 0 and −inf made of a condition become the condition, which layers
share. For cuDNN, torch 2.11 writes −65504 instead of −inf. Leaves alone attention with a mask that is causal as well,
and results in a layout of their own.
"""

import dataclasses
import operator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._prims_common import is_contiguous_or_false
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes

from qcompile import ops
from qcompile.pass_pipeline import Bound, PassResult
from qcompile.rewrite import RESHAPES, Refusal, Rewriter, args_of, equal, fake_value, is_pure, is_symbolic

aten = torch.ops.aten
# Where each operator keeps what is not query, key and value: mask, dropout, is_causal.
OPERATORS: dict[Any, tuple[int | str | None, int, int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: ("attn_mask", 3, 4),
    aten._scaled_dot_product_flash_attention.default: (None, 3, 4),
    aten._scaled_dot_product_efficient_attention.default: (3, 5, 6),
    aten._scaled_dot_product_cudnn_attention.default: (3, 5, 6),
}
CUDNN = aten._scaled_dot_product_cudnn_attention.default
# What torch 2.11 makes of False for cuDNN, instead of −inf (pytorch/pytorch#177842).
CUDNN_HIDDEN = -65504.0
LARGEST = 2**26  # elements of a mask, and of anything on the way to it, that is computed while compiling


@dataclasses.dataclass(frozen=True)
class SimplifyAttention:
    """Bring attention into one form, without masks and copies that a kernel can do without."""

    name: ClassVar[str] = "simplify_attention"
    stage: ClassVar[str] = "quantized"
    bound: ClassVar[Bound] = "exact"

    def run(self, gm: GraphModule) -> PassResult:
        rewriter = Rewriter(gm, self.name)
        masks = _Masks()
        refusals = []
        for node in list(gm.graph.nodes):
            if node.target in OPERATORS:
                reason = _rewrite(rewriter, node, masks)
                refusals += [Refusal(self.name, node.name, reason)] if reason else []
        return PassResult(rewriter.changes, tuple(refusals))


def _rewrite(rewriter: Rewriter, node: Node, masks: "_Masks") -> str:
    """Put ops.attention in a call's place; or say why not."""
    query, key, value = args_of(node)[:3]
    mask, dropout, causal = (_argument(node, place) for place in OPERATORS[node.target])
    if dropout:
        return f"attention with dropout {dropout} is not deterministic"
    if causal and mask is not None:
        return "attention has a mask and is causal at once"
    readers = list(node.users)
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in readers):
        return "more than the result of attention is read"
    if mask is not None:
        cudnn = node.target is CUDNN
        mask = _condition(_unexpanded(_unpadded(mask)), cudnn)
        visible = masks.of(mask, query.meta["val"].shape[-2], key.meta["val"].shape[-2], cudnn)
        mask, causal = (mask, False) if visible == "some" else (None, visible == "causal")
    key, value = _shared(key, value)
    options = (mask, bool(causal), node.kwargs.get("scale"))
    before = [result.meta["val"] for result in readers]
    layout = fake_value(rewriter.gm, ops.attention, (query, key, value, *options), {})
    same = all(_same_layout(layout, old) for old in before)
    if not same and not all(map(is_contiguous_or_false, before)):
        return "the result of attention lies in memory neither as [B, L, H, E] nor as [B, H, L, E]"
    if causal:
        key, value = (_first(rewriter, cached, query, node) for cached in (key, value))
    attention = rewriter.emit(ops.attention, (query, key, value, *options), before=node, of=node, name="attention")
    if not same:  # views that follow rely on the order of elements in memory
        contiguous = {"memory_format": torch.contiguous_format}
        attention = rewriter.emit(aten.clone.default, (attention,), contiguous, before=node, of=node, name="copy")
    for result in readers:
        rewriter.replace(result, attention)
    rewriter.gm.graph.erase_node(node)
    return ""


def _first(rewriter: Rewriter, cached: Node, query: Node, before: Node) -> Node:
    """The keys that causal queries can see, of a cache that is longer: as many as there are queries."""
    length, cached_length = query.meta["val"].shape[2], cached.meta["val"].shape[2]
    if not isinstance(length, int) or not isinstance(cached_length, int) or cached_length <= length:
        return cached
    return rewriter.emit(aten.slice.Tensor, (cached, 2, 0, length), before=before, of=before, name="seen")


def _argument(node: Node, place: int | str | None) -> Any:
    """An argument by position or name; None or False where it is left out."""
    if isinstance(place, int):
        return node.args[place] if place < len(node.args) else None
    return node.kwargs.get(place) if place is not None else None


def _unpadded(mask: Node) -> Node:
    """slice(pad(mask)) → mask: memory-efficient attention wants rows of its masks at multiples of 16 bytes."""
    expanded = _unexpanded(mask)
    if expanded.target is not aten.slice.Tensor:
        return mask
    padded = args_of(expanded)[0]
    if padded.target is not aten.constant_pad_nd.default:
        return mask
    source: Node = args_of(padded)[0]
    behind = all(before == 0 for before in args_of(padded)[1][::2])
    start, step = (expanded.args[2:3] or (0,))[0], (expanded.args[4:5] or (1,))[0]
    return source if behind and not start and step == 1 and _same_shape(source, expanded) else mask


def _unexpanded(mask: Node) -> Node:
    """expand(mask) → mask, which broadcasts by itself, if it has rows."""
    while mask.target is aten.expand.default and args_of(mask)[0].meta["val"].ndim >= 2:
        mask = args_of(mask)[0]
    return mask


def _whole(node: Node) -> Node:
    """slice(x) → x where it leaves nothing out, as indexing with symbolic sizes writes it."""
    while node.target is aten.slice.Tensor and _same_shape(node, args_of(node)[0]):
        node = args_of(node)[0]
    return node


def _condition(mask: Node, cudnn: bool) -> Node:
    """where(condition, 0, −inf), or where(not condition, −inf, 0) → condition: what models share; the numbers are made
    anew for each layer."""
    if mask.target is not aten.where.self or args_of(mask)[0].meta["val"].dtype != torch.bool:
        return mask
    condition, *numbers = args_of(mask)
    first, second = map(_constant, numbers)
    if second == 0 and condition.target is aten.logical_not.default:
        condition, first, second = args_of(condition)[0], second, first
    # A mask in float16 may have its own lowest number there; where it hides every key, that is another thing.
    torchs = second == CUDNN_HIDDEN and cudnn and mask.meta["val"].dtype != torch.float16
    if first != 0 or condition.meta["val"].dtype != torch.bool or not (second == -torch.inf or torchs):
        return mask
    condition = _unexpanded(condition)
    return condition if condition.meta["val"].ndim >= 2 else mask


def _constant(node: Any) -> float | None:
    """The number that a tensor of no dimensions is made of."""
    made = (aten.scalar_tensor.default, torch.ops.prims.scalar_tensor.default, aten.full.default)
    if not isinstance(node, Node) or node.target not in made:
        return None
    number = args_of(node)[-1]
    return float(number) if isinstance(number, int | float) and not node.meta["val"].ndim else None


def _shared(key: Node, value: Node) -> tuple[Node, Node]:
    """Key and value before they were repeated for groups of query heads, if both were, alike."""
    keys, values = _unrepeated(key), _unrepeated(value)
    if keys is None or values is None:
        return key, value
    return (keys, values) if keys.meta["val"].shape[1] == values.meta["val"].shape[1] else (key, value)


def _unrepeated(repeated: Node) -> Node | None:
    """view(clone(expand(unsqueeze(x, 2), [B, G, n, S, D])), [B, G·n, S, D]) → x [B, G, S, D]."""
    node = repeated
    if node.target not in RESHAPES:
        return None
    node = args_of(node)[0]
    if node.target is aten.clone.default:
        node = args_of(node)[0]
    if node.target is not aten.expand.default:
        return None
    unsqueezed = _whole(args_of(node)[0])
    if unsqueezed.target is not aten.unsqueeze.default or unsqueezed.meta["val"].ndim != 5:
        return None
    source: Node = args_of(unsqueezed)[0]
    (batch, groups, shares, length, channels), before = node.meta["val"].shape, source.meta["val"].shape
    if args_of(unsqueezed)[1] not in (2, -3) or not isinstance(groups * shares, int):
        return None
    wanted = (batch, groups * shares, length, channels)
    kept = all(map(equal, before, (batch, groups, length, channels)))
    return source if kept and all(map(equal, repeated.meta["val"].shape, wanted)) else None


class _Masks:
    """What masks hide, each computed once: layers share them."""

    def __init__(self) -> None:
        self._known: dict[tuple[Node, int, int, bool], str] = {}

    def of(self, mask: Node, queries: Any, keys: Any, cudnn: bool) -> str:
        """ "all" keys are seen, or those that is_causal leaves ("causal"), or "some" that must be looked up."""
        if not isinstance(queries, int) or not isinstance(keys, int) or queries * keys > LARGEST:
            return "some"
        place = mask, queries, keys, cudnn
        if place not in self._known:
            self._known[place] = self._look(*place)
        return self._known[place]

    def _look(self, mask: Node, queries: int, keys: int, cudnn: bool) -> str:
        value = _computed(mask)
        if value is None:
            return "some"
        if value.is_floating_point():
            hidden = value <= CUDNN_HIDDEN if cudnn else value == -torch.inf
            if not bool(((value == 0) | hidden).all()):
                return "some"
            value = value == 0
        if bool(value.all()):
            return "all"
        causal = torch.ones(queries, keys, dtype=torch.bool).tril()
        return "causal" if bool((value == causal).all()) else "some"


def _computed(node: Node) -> Tensor | None:
    """A tensor that depends on no input and no parameter, computed on the CPU; None if it does, or is too large."""
    needed: dict[Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        value = current.meta.get("val")
        known = isinstance(current.target, OpOverload) and current.target.namespace in ("aten", "prims")
        if current.op != "call_function" or not known or not is_pure(current) or is_symbolic(current):
            return None
        if not isinstance(value, Tensor) or (value.numel() > LARGEST and current.target is not aten.expand.default):
            return None
        needed[current] = None
        stack += [operand for operand in current.all_input_nodes if operand not in needed]
    values: dict[Node, Any] = {}
    with _disable_current_modes(), torch.no_grad():
        for current in node.graph.nodes:
            if current in needed:
                args, kwargs = torch.fx.node.map_arg((current.args, current.kwargs), values.__getitem__)
                if "device" in kwargs:
                    kwargs = {**kwargs, "device": torch.device("cpu")}
                moves = current.target is torch.ops.prims.device_put.default
                values[current] = args[0] if moves else current.target(*args, **kwargs)
    found: Tensor = values[node]
    return found


def _same_shape(left: Node, right: Node) -> bool:
    shapes = left.meta["val"].shape, right.meta["val"].shape
    return len(shapes[0]) == len(shapes[1]) and all(map(equal, *shapes))


def _same_layout(left: Tensor, right: Tensor) -> bool:
    """Equal strides, but for dimensions of one element."""
    return all(
        equal(size, 1) or equal(a, b) for size, a, b in zip(left.shape, left.stride(), right.stride(), strict=True)
    )
