"""The Triton kernel of attention with one query per sequence. Imports triton: only `attention_cuda` imports this, late.

One program reads one part of one sequence's keys and values under one key head, for all query heads that share it, and
keeps the softmax's largest score and sum as it goes (arXiv:1805.02867). Parts are combined by `attention_cuda.combine`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from qcompile.lowering.attention_cuda import choose_block, choose_warps, rounded

LOG2_E = 1.4426950408889634  # powers of two are what the hardware has


@triton.jit
def attention_kernel(
    query, key, value, mask, out, size, BATCHES, GROUPS, KEYS,
    query_batch, query_head, query_channel, key_batch, key_head, key_row, key_channel,
    value_batch, value_head, value_row, value_channel, mask_batch, mask_head, mask_key,
    SCALE: tl.constexpr, SHARES: tl.constexpr, CHANNELS: tl.constexpr, VALUE_CHANNELS: tl.constexpr,
    PARTS: tl.constexpr, MASK: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_VALUE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """query [B, H, 1, D], key [B, G, S, D], value [B, G, S, E]
    → out [PARTS, B, H, E], what each part of the keys gives by itself, and size [PARTS, B, H], the logarithm to base 2
    of its softmax's denominator, for several parts.

    Grid: (B · G, PARTS). query_batch and the like are strides in elements, those of the mask 0 where it broadcasts.
    SCALE is for exponents of two; SHARES is H / G. MASK: "", "bool" or "float". BLOCK_HEADS ≥ SHARES: surplus heads
    compute what nobody stores."""
    batch, group = (tl.program_id(0) // GROUPS).to(tl.int64), (tl.program_id(0) % GROUPS).to(tl.int64)
    heads = tl.arange(0, BLOCK_HEADS)
    channels, value_channels = tl.arange(0, BLOCK_CHANNELS), tl.arange(0, BLOCK_VALUE_CHANNELS)
    own = heads < SHARES
    first_head = group * SHARES
    query += batch * query_batch + first_head * query_head
    key += batch * key_batch + group * key_head
    value += batch * value_batch + group * value_head
    mask += batch * mask_batch + first_head * mask_head
    query_at = heads[:, None] * query_head + channels[None, :] * query_channel
    q = tl.load(query + query_at, mask=own[:, None] & (channels < CHANNELS)[None, :], other=0.0)
    y = tl.zeros((BLOCK_HEADS, BLOCK_VALUE_CHANNELS), dtype=tl.float32)
    high = tl.full((BLOCK_HEADS,), float("-inf"), dtype=tl.float32)
    sum_ = tl.zeros((BLOCK_HEADS,), dtype=tl.float32)
    begin, end = _share(tl.program_id(1), KEYS, PARTS, BLOCK_KEYS)
    # A 64-bit start per block and 32-bit offsets inside it: 64-bit addresses per element would not fit the registers.
    keys = tl.arange(0, BLOCK_KEYS)
    key_at = channels[:, None] * key_channel + keys[None, :] * key_row
    value_at = keys[:, None] * value_row + value_channels[None, :] * value_channel
    mask_at = heads[:, None] * mask_head + keys[None, :] * mask_key
    for start in range(begin, end, BLOCK_KEYS):
        block = tl.cast(start, tl.int64)
        visible = own[:, None] & (keys < end - start)[None, :]
        visible, added = _look(mask + block * mask_key + mask_at, visible, MASK)
        seen = tl.max(visible.to(tl.int32), 0) > 0  # keys that nobody sees are not read
        inside = seen[None, :] & (channels < CHANNELS)[:, None]
        k = tl.load(key + block * key_row + key_at, mask=inside, other=0.0)
        scores = tl.where(visible, tl.dot(q, k, input_precision="ieee") * SCALE + added, float("-inf"))
        higher = tl.maximum(high, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(high - base)
        inside = seen[:, None] & (value_channels < VALUE_CHANNELS)[None, :]
        v = tl.load(value + block * value_row + value_at, mask=inside, other=0.0)
        y = y * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        sum_ = sum_ * fade + tl.sum(weights, 1)
        high = higher
    row = (tl.program_id(1) * BATCHES + batch) * GROUPS * SHARES + first_head + heads
    # A query that sees no key reads zeros, and as a part counts for nothing.
    sum_ = tl.where(high == float("-inf"), 1.0, sum_)
    if PARTS > 1:
        tl.store(size + row, tl.maximum(high, -1e30) + tl.log2(sum_), mask=own)
    y = (y / sum_[:, None]).to(out.dtype.element_ty)
    out += row[:, None] * VALUE_CHANNELS + value_channels[None, :]
    tl.store(out, y, mask=own[:, None] & (value_channels < VALUE_CHANNELS)[None, :])


@triton.jit
def _share(part, KEYS, PARTS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """The range of keys that a part reads, in whole blocks but for the last."""
    share = tl.cdiv(tl.cdiv(KEYS, BLOCK_KEYS), PARTS) * BLOCK_KEYS
    begin = part * share
    return begin, tl.minimum(begin + share, KEYS)


@triton.jit
def _look(mask, visible, MASK: tl.constexpr):
    """Which keys of a block the heads see, and what is added to their scores, as an exponent of two."""
    added = tl.zeros(visible.shape, dtype=tl.float32)
    if MASK == "bool":
        visible = visible & (tl.load(mask, mask=visible, other=0) != 0)
    elif MASK == "float":
        found = tl.load(mask, mask=visible, other=float("-inf")).to(tl.float32)
        visible = found != float("-inf")
        added = tl.maximum(tl.where(visible, found, 0.0) * 1.4426950408889634, -3e38)  # what is finite stays so
    return visible, added


@triton_op("qcompile_triton::attention", mutates_args=())
def attention_op(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, parts: int
) -> tuple[Tensor, Tensor]:
    """query [B, H, 1, D], key [B, G, S, D], value [B, G, S, E], mask broadcasting to [B, H, 1, S]
    → what each part of the keys gives [parts, B, H, E] and its size [parts, B, H], float32, for `combine`. One part is
    the result itself, in the query's dtype; there are no sizes then."""
    batches, heads, _, channels = query.shape
    groups, keys, value_channels = key.shape[1], key.shape[2], value.shape[3]
    out, size = _results(query, value, parts)
    if batches == 0:
        return out, size
    kind, strides = "", (0, 0, 0)
    if mask is not None:
        wide = mask.expand(batches, heads, 1, keys)
        kind = "bool" if mask.dtype == torch.bool else "float"
        strides = wide.stride(0), wide.stride(1), wide.stride(3)
    block_heads, block_channels, block_values = (rounded(size) for size in (heads // groups, channels, value_channels))
    widest = max(block_channels, block_values)
    launch = wrap_triton(attention_kernel) if isinstance(attention_kernel, triton.JITFunction) else attention_kernel
    launch[(batches * groups, parts)](
        query, key, value, query if mask is None else mask, out, size, batches, groups, keys,
        query.stride(0), query.stride(1), query.stride(3), *key.stride(), *value.stride(), *strides,
        SCALE=scale * LOG2_E, SHARES=heads // groups, CHANNELS=channels, VALUE_CHANNELS=value_channels,
        PARTS=parts, MASK=kind,
        BLOCK_HEADS=block_heads, BLOCK_KEYS=choose_block(block_heads, widest * key.element_size()),
        BLOCK_CHANNELS=block_channels, BLOCK_VALUE_CHANNELS=block_values,
        num_warps=choose_warps(block_heads, widest), num_stages=2,
    )  # fmt: skip
    return out, size


def _results(query: Tensor, value: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    shape = (parts, query.shape[0], query.shape[1])
    out = query.new_empty((*shape, value.shape[3]), dtype=query.dtype if parts == 1 else torch.float32)
    return out, query.new_empty(0 if parts == 1 else shape, dtype=torch.float32)


@attention_op.register_fake
def _fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, parts: int
) -> tuple[Tensor, Tensor]:
    return _results(query, value, parts)
