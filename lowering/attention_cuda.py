"""Attention on NVIDIA GPUs: one query per sequence by our own Triton kernel, the rest by torch's.

With one query torch takes its memory-efficient kernel as soon as there is a mask, as there is with a static cache: keys
are repeated for every query head first, and one program per head walks the whole cache. Ours (`attention_kernel`) reads
each key once for all heads that share it, in several parts at once, and none that the mask hides.
"""

import math

import torch
from torch import Tensor

from qcompile.lowering.devices import device_of, without_triton
from qcompile.lowering.scaled_mm_triton import not_installed
from qcompile.lowering.target import Target
from qcompile.rewrite import hint

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_QUERY = 32 * 1024  # bytes that a program keeps: query heads of one key head × channels
# Up to so many parts Inductor sums in the kernel that reads the result; more cost two launches, so they must be long.
FUSED_PARTS, FEWEST_KEYS = 4, 64
MOST_PARTS, FEWEST_KEYS_MORE = 32, 512
BLOCK_BYTES = 16 * 1024  # of keys that are read at a time
BLOCK_SCORES = 64 * 64  # that are computed at a time: more spill registers


def attention(
    target: Target, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor | None:
    """qcompile.ops.attention of one query per sequence; None for all others, and where torch's flash kernel does it."""
    one = isinstance(query.shape[2], int) and query.shape[2] == 1 and not causal
    if not one or (mask is None and has_flash(target, query, value)):
        return None
    if takes(query, key, value) or without_triton(target) or not_installed():
        return None
    from qcompile.lowering import attention_kernel  # noqa: F401  (defines the operator)

    scale = query.shape[-1] ** -0.5 if scale is None else scale
    parts = choose_parts(hint(key.shape[0]) * hint(key.shape[1]), hint(key.shape[2]), target)
    out, size = torch.ops.qcompile_triton.attention.default(query, key, value, mask, scale, parts)
    return combine(out, size).unsqueeze(2).to(query.dtype)


def takes(query: Tensor, key: Tensor, value: Tensor) -> str:
    """Why the kernel cannot take these arguments; empty if it can."""
    if query.dtype not in DTYPES:
        return f"needs {', '.join(map(str, DTYPES))}, got {query.dtype}"
    sizes = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    if not all(isinstance(size, int) for size in sizes):
        return f"needs heads and channels of known number, got {sizes}"
    heads, groups, *channels = sizes
    if rounded(heads // groups) * rounded(max(channels)) * query.element_size() > LARGEST_QUERY:
        shares = f"{heads // groups} heads of {max(channels)} channels, {query.dtype}"
        return f"needs query heads of one key head to fit {LARGEST_QUERY} bytes, got {shares}"
    return ""


def rounded(size: int) -> int:
    """A block's size for so many elements: a power of two, at least the 16 of a matrix instruction."""
    return max(16, 1 << (size - 1).bit_length())


def choose_block(heads: int, row: int) -> int:
    """How many keys a program reads at a time, for so many query heads and bytes of a key."""
    return max(16, min(128, BLOCK_BYTES // row, BLOCK_SCORES // heads))


def choose_warps(heads: int, channels: int) -> int:
    """Warps of a program that keeps sums of so many heads and channels."""
    return 4 if heads * channels <= 64 * 64 else 8


def choose_parts(programs: int, keys: int, target: Target) -> int:
    """How many parts to cut the keys into, so that every multiprocessor has two to four to read: a power of two."""
    device = device_of(target)
    processors = device.processors if device is not None else 1
    parts = 1
    while parts < MOST_PARTS and parts * programs < 2 * processors:
        if keys < 2 * parts * (FEWEST_KEYS if parts < FUSED_PARTS else FEWEST_KEYS_MORE):
            break
        parts *= 2
    return parts


def combine(out: Tensor, size: Tensor) -> Tensor:
    """What parts of the keys give together: out [P, B, H, E], size [P, B, H] → [B, H, E], P a power of two.

    In pairs: softmax over two sets of keys is the mean of softmax over each, weighted by their denominators. size is a
    denominator's logarithm to base 2, and finite. Plain ATen, in a fixed order: Inductor makes it part of the next
    kernel, as long as no weight is made of more than four numbers. (Where every key is hidden by a large finite number,
    float32 does not hold a size well, and parts count alike.)
    """
    while len(out) > 1:
        left, right = size[0::2], size[1::2]
        share = torch.sigmoid((left - right) * math.log(2)).unsqueeze(-1)
        out = out[1::2] + (out[0::2] - out[1::2]) * share
        size = torch.maximum(left, right) + torch.log2(1 + torch.exp2(-(left - right).abs()))
    return out[0]


def has_flash(target: Target, query: Tensor, value: Tensor) -> bool:
    """Whether torch has a flash kernel for these operands, as many keys as queries if causal, which reads shared keys
    where they are."""
    device = device_of(target)
    half = query.dtype in (torch.float16, torch.bfloat16)
    same = query.shape[3] == value.shape[3] and query.shape[3] <= 256
    return device is not None and device.capability >= 80 and half and same
