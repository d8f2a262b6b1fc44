"""Attention on CPU: beside int8 products torch's flash kernel takes most of the time that is left. Two forms replace
it, neither less exact:

decode: one query per sequence. The flash kernel is made for tiles of queries; with one it takes several times as long
as reading the cache does. As plain ATen, Inductor makes it two reductions over the cache:

    p_s = exp(Σ_d q_d·k_sd · scale + mask_s − max);   y_d = Σ_s p_s·v_sd / Σ_s p_s,       in at least float32

many queries, with AVX512: our own kernel (x86/attention.cpp). It skips what the mask hides, whatever built the mask.
"""

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from qcompile.lowering.cpu_library import ATTENTION, DTYPES, LIBRARY
from qcompile.lowering.target import Target
from qcompile.ops import wide


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)


LIBRARY.define(  # type: ignore[no-untyped-call]
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake("qcompile_cpu::attention", _fake, lib=LIBRARY)
KERNEL = torch.ops.qcompile_cpu.attention.default


def attention(
    target: Target, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor | None:
    """qcompile.ops.attention in one of the two forms; None where neither takes it."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(query.shape[2], int) and query.shape[2] == 1 and not causal:
        return decode(query, key, value, mask, scale)
    unbacked = any(free_unbacked_symbols(x) for x in (query, key, mask) if x is not None)
    if query.dtype in DTYPES and not unbacked and not ATTENTION.runs_on(target):
        return many(query, key, value, mask, causal, scale)
    return None


def decode(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """query [B, H, 1, D], key and value [B, G, S, D] with G dividing H, mask broadcasting to [B, H, 1, S]
    → [B, H, 1, D]."""
    dtype = wide(query.dtype)
    heads = (key.shape[1], query.shape[1] // key.shape[1])
    batch, _, _, channels = query.shape
    grouped = query.to(dtype).reshape(batch, *heads, 1, channels)
    scores = (grouped * key.to(dtype).unsqueeze(2)).sum(-1).flatten(1, 2) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = torch.where(mask[..., 0, :], scores, -torch.inf)
    elif mask is not None:
        scores = scores + mask[..., 0, :].to(dtype)
    # Finite bounds keep a sequence whose every key is masked at zeros, as the flash kernel does.
    limits = torch.finfo(dtype)
    share = torch.exp(scores - scores.amax(-1, keepdim=True).clamp(min=limits.min))
    total = share.sum(-1, keepdim=True).clamp(min=limits.tiny)
    shares = share.reshape(batch, *heads, -1, 1)
    y: Tensor = (shares * value.to(dtype).unsqueeze(2)).sum(3).flatten(1, 2)
    return (y / total).unsqueeze(2).to(query.dtype)


def many(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """query [B, H, L, D], key and value [B, G, S, D] with G dividing H, mask broadcasting to [B, H, L, S]
    → [B, H, L, D]."""
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -torch.inf).to(query.dtype)
        rows = _contiguous_rows(mask.expand(*mask.shape[:-1], key.shape[2]))
        mask = rows.expand(*query.shape[:3], key.shape[2])
    operands = [_contiguous_rows(x) for x in (query, key, value)]
    y: Tensor = KERNEL(*operands, mask, causal, scale)
    return y


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
