"""The Triton kernel of scaled_grouped_mm and its operator. Imports triton: `scaled_grouped_mm_triton` does so late.

A product's tile (scaled_mm_kernel), with the one thing before it: which expert, and which of its rows. Every program
finds that out from the offsets, so nothing waits for them and a CUDA graph serves any routing. There are as many
programs as the worst routing needs; those that find no rows end at once.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from qcompile.lowering.scaled_mm_kernel import accumulate, place, write
from qcompile.lowering.tiles import Tile, pick

LARGEST_TILE = 128 * 128


@triton.jit(do_not_specialize=["S", "GROUP_M"])
def scaled_grouped_mm_kernel(
    x, weight, x_scale, weight_scale, offsets, out,
    S, N, K, E, x_row, x_column, weight_matrix, weight_row, weight_column, scale_row, GROUP_M,
    IS_INT8: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """x [S, K], weight [E, N, K] → out [S, N], the rows of each expert by its own matrix.

    Grid: (tiles of rows × tiles of columns). x_row and the like are strides in elements; scale_row is 0 for one scale
    in all. EXPERTS: a power of two, at least E.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = place(tl.program_id(0), tl.num_programs(0) // tiles_n, tiles_n, GROUP_M)
    expert, row, height = _rows_of(tile_m, offsets, S, E, EXPERTS, BLOCK_M)
    column = (tile_n * BLOCK_N).to(tl.int64)
    if height > 0:
        rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        width = (N - column).to(tl.int32)
        sums = accumulate(
            x + row * x_row, weight + expert * weight_matrix + column * weight_row, rows,
            tl.minimum(columns, width - 1), height, K, x_row, x_column, weight_row, weight_column,
            IS_INT8, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, 1, SWAP,
        )  # fmt: skip
        write(
            sums, 0, x_scale + row * scale_row, weight_scale + expert * N + column, weight_scale, weight_scale,
            out + row * N + column, N, height, width, scale_row, 0, 0, False, False, "", BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _rows_of(tile, offsets, S, E, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a tile of rows, its first row, and how many rows the expert has from there on: 0 for no tile."""
    index = tl.arange(0, EXPERTS)
    ends = tl.load(offsets + index, mask=index < E, other=0).to(tl.int32)
    begins = tl.load(offsets + index - 1, mask=(index > 0) & (index < E), other=0).to(tl.int32)
    ends = tl.minimum(ends, S)
    tiles = tl.where(ends > begins, tl.cdiv(ends - begins, BLOCK_M), 0)
    before = tl.cumsum(tiles, 0) - tiles
    mine = (tile >= before) & (tile < before + tiles)
    row = tl.sum(tl.where(mine, begins + (tile - before) * BLOCK_M, 0), 0)
    expert = tl.sum(tl.where(mine, index, 0), 0)
    return expert.to(tl.int64), row.to(tl.int64), tl.sum(tl.where(mine, ends, 0), 0) - row


@triton_op("qcompile_triton::scaled_grouped_mm", mutates_args=())
def scaled_grouped_mm_op(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype,
    tiles: list[int],
) -> Tensor:
    """x [S, K], weight [E, N, K] → [S, N] of out_dtype. x_scale [S] or [], any strides.

    tiles: as `tiles.by_bucket` makes them for the mean number of an expert's rows, or one entry of that.
    """
    (rows, k), (experts, n, _) = x.shape, weight.shape
    out = x.new_empty((rows, n), dtype=out_dtype)
    if rows == 0:
        return out
    tile = plain(pick(tiles, rows // experts))
    count = min(rows, rows // tile.block_m + min(rows, experts))  # every expert may have one tile that is not full
    kernel = scaled_grouped_mm_kernel
    launch = wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel
    launch[(count * triton.cdiv(n, tile.block_n),)](
        x, weight, x_scale.contiguous(), weight_scale.contiguous(), offsets.contiguous(), out,
        rows, n, k, experts, *x.stride(), *weight.stride(), 1 if x_scale.ndim else 0, tile.group,
        **constants(tile, x.dtype == torch.int8, k, experts),
    )  # fmt: skip
    return out


def constants(tile: Tile, is_int8: bool, k: int, experts: int) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "IS_INT8": is_int8, "EVEN_K": k % tile.block_k == 0, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k, "SWAP": tile.swap, "EXPERTS": triton.next_power_of_2(experts),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def plain(tile: Tile) -> Tile:
    """A tile of products in the one form that this kernel has, and no larger than its registers allow."""
    block_m, block_n = tile.block_m, tile.block_n
    while block_m * block_n > LARGEST_TILE:
        block_m, block_n = (block_m // 2, block_n) if block_m > block_n else (block_m, block_n // 2)
    return Tile(block_m, block_n, tile.block_k, tile.warps, tile.stages, tile.group, swap=tile.swap)


scaled_grouped_mm_op.register_fake(
    lambda x, weight, x_scale, weight_scale, offsets, out_dtype, tiles: x.new_empty(
        (x.shape[0], weight.shape[1]), dtype=out_dtype
    )
)
