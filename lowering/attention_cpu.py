"""Attention on CPU, where it stays float: two forms that torch's flash kernel is slow at, without loss.

decode: one query per sequence. The flash kernel is made for tiles of queries; with one it takes several times as long as
reading the cache does. As plain ATen, Inductor makes it two reductions over the cache, and reads repeated heads of
grouped-query attention without copying them:

    p_s = exp(Σ_d q_d·k_sd · scale + mask_s − max);   y_d = Σ_s p_s·v_sd / Σ_s p_s,       in float32

causal: a mask that depends on no input (transformers builds one whenever it is given none) and that is exactly 0 on and
below the diagonal and −∞ above it. Told so, the flash kernel skips the half that −∞ cancels.
"""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
# Looking at a mask takes its memory at compile time: larger ones are left alone.
LARGEST_MASK = 2**26


def causal_calls(gm: GraphModule) -> set[Node]:
    """The calls of ATTENTION whose mask is known and says no more than is_causal would."""
    known: dict[Any, bool] = {}
    found = set()
    for node in gm.graph.find_nodes(op="call_function", target=ATTENTION):
        mask = node.kwargs.get("attn_mask")
        if mask is not None and mask not in known:
            known[mask] = _is_causal(mask, int_sizes(node.args[0]), int_sizes(node.args[1]))
        if known.get(mask, False):
            found.add(node)
    return found


def int_sizes(node: Any) -> tuple[int, ...]:
    """The sizes of a node's value; empty if some are symbolic."""
    sizes = tuple(node.meta["val"].shape)
    return sizes if all(isinstance(size, int) for size in sizes) else ()


def _is_causal(mask: Node, query: tuple[int, ...], key: tuple[int, ...]) -> bool:
    sizes = int_sizes(mask)
    if not query or not key or not sizes or query[2] != key[2] or sizes[-2:] != (query[2], query[2]):
        return False
    if mask.meta["val"].numel() > LARGEST_MASK or (value := constant(mask)) is None:
        return False
    with torch.utils._python_dispatch._disable_current_modes():
        causal = torch.full(sizes[-2:], -torch.inf, dtype=value.dtype).triu(1)
        return bool((value == causal).all())


def constant(node: Node) -> Tensor | None:
    """The value of a node that depends on no input, parameter or random number; None if it does."""
    needed: set[Node] = set()
    stack = [node]
    while stack:
        if (operand := stack.pop()) in needed:
            continue
        seeded = torch.Tag.nondeterministic_seeded in getattr(operand.target, "tags", ())
        if operand.op != "call_function" or operand.is_impure() or seeded:
            return None
        needed.add(operand)
        stack += operand.all_input_nodes
    graph = Graph()
    copies: dict[Node, Node] = {}
    for operand in node.graph.nodes:
        if operand in needed:
            copies[operand] = graph.node_copy(operand, lambda n: copies[n])
    graph.output(copies[node])
    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
        value: Tensor = GraphModule({}, graph)()
    return value


def takes_decode(node: Node, query: Tensor, dropout: float, causal: bool) -> bool:
    """Whether a call of ATTENTION has one query per sequence and nothing that the decode form leaves out."""
    reads_output = all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
    one = isinstance(query.shape[2], int) and query.shape[2] == 1
    return one and reads_output and not dropout and not causal


def decode(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """query [B, H, 1, D], key and value [B, H, S, D], mask broadcasting to [B, H, 1, S] → [B, H, 1, D]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query.to(torch.float32) * key.to(torch.float32)).sum(-1) * scale
    if mask is not None:
        scores = scores + mask[..., 0, :].to(torch.float32)
    # Finite bounds keep a sequence whose every key is masked at zeros, as the flash kernel does.
    limits = torch.finfo(torch.float32)
    share = torch.exp(scores - scores.amax(-1, keepdim=True).clamp(min=limits.min))
    y = (share.unsqueeze(-1) * value.to(torch.float32)).sum(2)
    return (y / share.sum(-1, keepdim=True).clamp(min=limits.tiny)).unsqueeze(2).to(query.dtype)


def lowered(node: Node, is_causal: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call of ATTENTION becomes. is_causal: whether it is one of `causal_calls`."""
    query, key, value, dropout, causal = (*args, *(0.0, False)[len(args) - 3 :])
    if is_causal:
        return ATTENTION(query, key, value, dropout, True, attn_mask=None, scale=kwargs.get("scale"))
    if takes_decode(node, query, dropout, causal):
        y = decode(query, key, value, kwargs.get("attn_mask"), kwargs.get("scale"))
        return y, y  # the second, the logarithm of the sums, has no reader
    return ATTENTION(*args, **kwargs)
