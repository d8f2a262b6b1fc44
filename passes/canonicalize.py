"""canonicalize: one spelling for every linear.

Whatever a model writes (nn.Linear, Conv1D, matmul, F.linear on any rank), capture yields

    x2: f32[M, K] = view(x, [M, K]);  t: f32[K, N] = permute(weight, [1, 0])
    y2: f32[M, N] = addmm(bias, x2, t) | mm(x2, t);  y: f32[B, S, N] = view(y2, [B, S, N])

and this pass leaves

    y: f32[B, S, N] = linear(x, weight, bias)        # weight [N, K], bias [N] or None

Applies when the right-hand matrix is static: computed from parameters and constants alone (a transposed parameter,
a Conv1D's weight, a merged LoRA), or a batch of copies of one static matrix. A static matrix on the left, W·x, is a
linear over the transpose of x. Leaves alone products of two activations, products with a batch of different matrices,
outer products with a matrix on the left, and addmm with alpha or beta other than 1.
Experts, products of rows with the matrix that each was routed to, become

    y: f32[S, N] = qcompile.grouped_linear(x, weight, offsets)   # weight [E, N, K], rows sorted by expert

whether rows are sorted (`grouped_products`) or matrices gathered for each of them (`gathered_products`).
It also merges identical views, so that q, k and v read one tensor, and drops views that change nothing.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch._prims_common import is_contiguous_or_false
from torch.fx import GraphModule, Node

from qcompile.pass_pipeline import Bound, PassResult
from qcompile.passes.gathered_products import rewrite_gathered
from qcompile.passes.grouped_products import rewrite_grouped
from qcompile.rewrite import RESHAPES, Refusal, Rewriter, args_of, eliminate_unused, equal, static_nodes

aten = torch.ops.aten
TRANSPOSES = (aten.t.default, aten.permute.default, aten.transpose.int)
CASTS = (torch.ops.prims.convert_element_type.default, aten._to_copy.default)
MERGED = (*RESHAPES, *TRANSPOSES, *CASTS, aten.expand.default, aten.unsqueeze.default, aten.slice.Tensor)
COPIES = (*RESHAPES, aten.expand.default, aten.unsqueeze.default, aten.clone.default)
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


@dataclasses.dataclass(frozen=True)
class Canonicalize:
    """Bring every linear into one form, `aten.linear(x, weight, bias)`, and experts into `qcompile.grouped_linear`."""

    name: ClassVar[str] = "canonicalize"
    stage: ClassVar[str] = "captured"
    bound: ClassVar[Bound] = "exact"

    def run(self, gm: GraphModule) -> PassResult:
        rewriter = Rewriter(gm, self.name)
        refusals = tuple(_rewrite_products(rewriter))
        rewrite_grouped(rewriter)
        rewrite_gathered(rewriter)
        _merge_identical(rewriter)
        for node in list(gm.graph.nodes):
            if node.target is aten.linear.default:
                _lift_over_view(rewriter, node)
        for node in list(gm.graph.nodes):
            if node.target in RESHAPES:
                _drop_view(rewriter, node)
        if rewriter.changes:
            eliminate_unused(gm)
        return PassResult(rewriter.changes, refusals)


def _rewrite_products(rewriter: Rewriter) -> list[Refusal]:
    static = static_nodes(rewriter.gm)
    refusals = []
    for node in list(rewriter.gm.graph.nodes):
        if node.target not in PRODUCTS or node in static:
            continue
        *start, x, matrix = node.args
        if x in static and matrix not in static and not start:
            _from_left(rewriter, node, x, matrix, static)
            continue
        if x in static or matrix not in static:
            continue
        if any(scale != 1 for scale in node.kwargs.values()):
            refusals.append(Refusal("canonicalize", node.name, "addmm scales its sum (alpha, beta), no linear does"))
            continue
        single = _single(rewriter, matrix, node, static)
        if single is not None:
            _to_linear(rewriter, node, x, single, start[0] if start else None, static)
    return refusals


def _single(rewriter: Rewriter, matrix: Node, before: Node, static: set[Node]) -> Node | None:
    """The one matrix that a product's operand is, or holds a batch of copies of; None if they differ."""
    source, sizes = matrix, matrix.meta["val"].shape[-2:]
    while source.meta["val"].ndim > 2 and source.target in COPIES:
        above: Node = args_of(source)[0]
        if above.meta["val"].ndim < 2 or not all(map(equal, above.meta["val"].shape[-2:], sizes)):
            break
        source = above
    if not all(equal(size, 1) for size in source.meta["val"].shape[:-2]):
        return None
    while source.meta["val"].ndim > 2:
        source = rewriter.emit(aten.squeeze.dim, (source, 0), before=before, of=matrix, name="matrix")
        static.add(source)
    return source


def _from_left(rewriter: Rewriter, node: Node, matrix: Node, x: Node, static: set[Node]) -> None:
    """W [N, K] · x [.., K, M] = (linear(x [.., M, K], W))ᵀ; an outer product (K = 1) has nothing to gain."""
    single = _single(rewriter, matrix, node, static)
    if single is None or equal(single.meta["val"].shape[1], 1):
        return
    swapped = [*range(x.meta["val"].ndim - 2), -1, -2]

    def emit(target: Any, args: tuple[Any, ...], name: str, **keywords: Any) -> Node:
        return rewriter.emit(target, args, keywords, before=node, of=node, name=name)

    rows = emit(aten.permute.default, (x, swapped), "rows")
    columns = emit(aten.permute.default, (emit(aten.linear.default, (rows, single), "linear"), swapped), "columns")
    # Views that follow rely on the order of a product's elements in memory.
    rewriter.replace(node, emit(aten.clone.default, (columns,), "copy", memory_format=torch.contiguous_format))


def _to_linear(rewriter: Rewriter, node: Node, x: Node, matrix: Node, addend: Node | None, static: set[Node]) -> None:
    weight = _untransposed(rewriter, matrix, node, static)
    columns = node.meta["val"].shape[-1]
    is_bias = addend is not None and addend in static and tuple(addend.meta["val"].shape) == (columns,)
    args = (x, weight, addend) if is_bias else (x, weight)
    linear = rewriter.emit(aten.linear.default, args, before=node, of=node, name="linear")
    if addend is not None and not is_bias:
        linear = rewriter.emit(aten.add.Tensor, (linear, addend), before=node, of=node, name="add")
    rewriter.replace(node, linear)


def _untransposed(rewriter: Rewriter, matrix: Node, before: Node, static: set[Node]) -> Node:
    if matrix.target in TRANSPOSES:
        source: Node = args_of(matrix)[0]
        if source.meta["val"].ndim == 2 and _swaps(matrix):
            return source
    weight = rewriter.emit(aten.permute.default, (matrix, [1, 0]), before=before, of=matrix, name="weight")
    static.add(weight)
    return weight


def _swaps(transpose: Node) -> bool:
    """Whether a transpose of a matrix exchanges its two dimensions."""
    if transpose.target is aten.permute.default:
        return bool(args_of(transpose)[1][0] % 2 == 1)
    dims = args_of(transpose)[1:] or (0, 1)
    return bool((dims[0] - dims[1]) % 2 == 1)


def _merge_identical(rewriter: Rewriter) -> None:
    seen: dict[Any, Node] = {}
    for node in list(rewriter.gm.graph.nodes):
        if node.target not in MERGED:
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node and not (node.target in CASTS and _escapes(node) and _escapes(first)):
            rewriter.replace(node, first)


def _escapes(node: Node) -> bool:
    """Whether a caller gets this tensor or a view of it. Of two such copies it may write to one."""
    return any(user.op == "output" or (user.target in MERGED and _escapes(user)) for user in node.users)


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in sorted(value.items()))
    return (type(value), value)


def _lift_over_view(rewriter: Rewriter, linear: Node) -> None:
    """linear(view(x, [M, K])) → view(linear(x), [M, N]) where the view only merges leading dimensions."""
    view = linear.args[0]
    assert isinstance(view, Node)
    if view.target not in RESHAPES or view.meta["val"].ndim != 2:
        return
    x = view.args[0]
    assert isinstance(x, Node)
    if x.meta["val"].ndim < 2 or not equal(x.meta["val"].shape[-1], view.meta["val"].shape[-1]):
        return
    lifted = rewriter.emit(aten.linear.default, (x, *linear.args[1:]), before=linear, of=linear, name="linear")
    rows = args_of(view)[1][0]
    columns = linear.meta["val"].shape[-1]
    if columns == 0:
        return  # a size of −1 in the view would be ambiguous
    flat = rewriter.emit(aten.view.default, (lifted, [rows, columns]), before=linear, of=linear, name="view")
    rewriter.replace(linear, flat)


def _drop_view(rewriter: Rewriter, view: Node) -> None:
    """view(view(x, a), b) → view(x, b), and view(x, shape of x) → x."""
    source: Node = args_of(view)[0]
    if source.target in RESHAPES and _is_contiguous(source.args[0]):
        viewed: Node = args_of(source)[0]
        rewriter.set_input(view, source, viewed)
        source = viewed
    before, after = source.meta["val"].shape, view.meta["val"].shape
    if len(before) == len(after) and all(map(equal, before, after)):
        rewriter.replace(view, source)


def _is_contiguous(node: Any) -> bool:
    return bool(is_contiguous_or_false(node.meta["val"]))
