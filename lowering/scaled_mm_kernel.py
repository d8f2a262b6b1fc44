"""The Triton kernel of scaled_mm and its operator. Imports triton: only `scaled_mm_triton` imports this, late.

One program computes one tile of the output. Sums are int32 for int8 and float32 for fp8. Without split-K the epilogue
runs on the sums in registers; with it, each program stores the sums of its share of K, and what adds them up is plain
PyTorch. Operands come through pointers, or, with TMA, through descriptors of whole operands, which each program makes
for itself: nothing but tensors and numbers crosses the launch. Tiles that say `hopper` go to scaled_mm_hopper, those
that say `cublas` to scaled_mm_cublas, if they can.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
import functools
import importlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.library import triton_op, wrap_triton

from qcompile.lowering import scaled_mm_cublas, scaled_mm_steps
from qcompile.lowering.tiles import Tile, pick
from qcompile.products import epilogue

Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
place, finish = triton.jit(scaled_mm_steps.place), triton.jit(scaled_mm_steps.finish)


@triton.jit(do_not_specialize=["M", "GROUP_M"])
def scaled_mm_kernel(
    x, weight, x_scale, weight_scale, bias, residual, out,
    M, N, K, x_row, x_column, weight_row, weight_column, scale_row, residual_row, residual_column, GROUP_M,
    IS_INT8: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """x [M, K], weight [N, K] → out [M, N], or, if SPLIT_K > 1, partial sums out [parts, M, N].

    Grid: (tiles, parts). x_row and the like are strides in elements; scale_row is 0 for one scale in all. bias and
    residual are not read unless HAS_BIAS and HAS_RESIDUAL. TMA needs what `can_use_tma` says of x and weight. One
    compiled kernel serves any number of tokens, group and parts.
    """
    if TMA:
        x = tl.make_tensor_descriptor(x, [M, K], [x_row, 1], [BLOCK_M, BLOCK_K])
        weight = tl.make_tensor_descriptor(weight, [N, K], [weight_row, 1], [BLOCK_N, BLOCK_K])
    tile_m, tile_n = place(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    # A 64-bit start per tile and 32-bit offsets inside it: 64-bit addresses per element would not fit the registers.
    row, column = (tile_m * BLOCK_M).to(tl.int64), (tile_n * BLOCK_N).to(tl.int64)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    height, width = (M - row).to(tl.int32), (N - column).to(tl.int32)
    if TMA:
        sums = _accumulate_tma(
            x, weight, tile_m * BLOCK_M, tile_n * BLOCK_N, K, IS_INT8, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K, SWAP
        )
    else:
        sums = accumulate(
            x + row * x_row, weight + column * weight_row, rows, tl.minimum(columns, width - 1), height,
            K, x_row, x_column, weight_row, weight_column,
            IS_INT8, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K, SWAP,
        )  # fmt: skip
    out += row * N + column
    if SPLIT_K > 1:
        out += tl.program_id(1).to(tl.int64) * M * N
        inside = (rows < height)[:, None] & (columns < width)[None, :]
        tl.store(out + (rows[:, None] * N + columns[None, :]), sums, mask=inside)
    else:
        x_scale += row * scale_row
        weight_scale += column
        bias += column
        residual += row * residual_row + column * residual_column
        if BLOCK_M * BLOCK_N > 128 * 128:  # in two halves, for the registers
            left, right = tl.split(tl.permute(tl.reshape(sums, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            write(
                left, 0, x_scale, weight_scale, bias, residual, out, N, height, width, scale_row, residual_row,
                residual_column, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, BLOCK_M, BLOCK_N // 2,
            )  # fmt: skip
            write(
                right, BLOCK_N // 2, x_scale, weight_scale, bias, residual, out, N, height, width, scale_row,
                residual_row, residual_column, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, BLOCK_M, BLOCK_N // 2,
            )  # fmt: skip
        else:
            write(
                sums, 0, x_scale, weight_scale, bias, residual, out, N, height, width, scale_row, residual_row,
                residual_column, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit
def write(
    sums, start, x_scale, weight_scale, bias, residual, out, N, height, width, scale_row, residual_row,
    residual_column, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The results of BLOCK_N columns from `start` on; pointers are at the tile's corner."""
    rows, columns = tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_N)
    y = finish(
        sums, rows, columns, x_scale, weight_scale, bias, residual, height, width, scale_row, residual_row,
        residual_column, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
    )  # fmt: skip
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    tl.store(out + (rows[:, None] * N + columns[None, :]), y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def accumulate(
    x, weight, rows, columns, height, K, x_row, x_column, weight_row, weight_column,
    IS_INT8: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCK_M, BLOCK_N] over this program's share of K. Past the end of K both operands are zeros.

    SWAP multiplies weight by xᵀ: with few rows of x, the weight's rows fill the matrix instruction's 64. Rows from
    `height` on are not read. (As copies of the last row, as the weight's are, they made one token slower than sixteen:
    every program fetched the same 256 bytes sixteen times over.) Tiles too large to spare the registers do copy it.
    """
    dtype: tl.constexpr = tl.int32 if IS_INT8 else tl.float32
    MASKED: tl.constexpr = BLOCK_M <= 128
    there = rows < height
    if not MASKED:
        rows = tl.minimum(rows, height - 1)
    if SWAP:
        left, right, left_rows, right_rows = weight, x, columns, rows
        left_row, left_column, right_row, right_column = weight_row, weight_column, x_row, x_column
        sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=dtype)
    else:
        left, right, left_rows, right_rows = x, weight, rows, columns
        left_row, left_column, right_row, right_column = x_row, x_column, weight_row, weight_column
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=dtype)
    begin, end = _share(K, BLOCK_K, SPLIT_K)
    if SPLIT_K > 1:
        left += begin.to(tl.int64) * BLOCK_K * left_column
        right += begin.to(tl.int64) * BLOCK_K * right_column
    inner = tl.arange(0, BLOCK_K)
    lefts = left + (left_rows[:, None] * left_row + inner[None, :] * left_column)
    rights = right + (right_rows[None, :] * right_row + inner[:, None] * right_column)
    for step in range(begin, end):
        valid = inner < K - step * BLOCK_K
        a = _read(lefts, there[:, None], valid[None, :], MASKED and not SWAP, EVEN_K)
        b = _read(rights, there[None, :], valid[:, None], MASKED and SWAP, EVEN_K)
        sums = tl.dot(a, b, sums, out_dtype=dtype)
        lefts += BLOCK_K * left_column
        rights += BLOCK_K * right_column
    if SWAP:
        sums = tl.trans(sums)
    return sums


@triton.jit
def _read(pointers, there, valid, MASKED: tl.constexpr, EVEN_K: tl.constexpr):
    """One step of an operand; zeros past the end of K and, if MASKED, where there is no row."""
    if MASKED:
        values = tl.load(pointers, mask=there if EVEN_K else there & valid, other=0.0)
    elif EVEN_K:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=valid, other=0.0)
    return values


@triton.jit
def _accumulate_tma(
    x, weight, row, column, K, IS_INT8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """As `accumulate`, from descriptors: what lies outside of an operand arrives as zeros."""
    dtype: tl.constexpr = tl.int32 if IS_INT8 else tl.float32
    if SWAP:
        left, right, left_row, right_row = weight, x, column, row
        sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=dtype)
    else:
        left, right, left_row, right_row = x, weight, row, column
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=dtype)
    begin, end = _share(K, BLOCK_K, SPLIT_K)
    for step in range(begin, end):
        a = left.load([left_row, step * BLOCK_K])
        b = right.load([right_row, step * BLOCK_K])
        sums = tl.dot(a, b.T, sums, out_dtype=dtype)
    if SWAP:
        sums = tl.trans(sums)
    return sums


@triton.jit
def _share(K, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """The range of steps of K, each of BLOCK_K, that this program adds up."""
    steps = tl.cdiv(K, BLOCK_K)
    begin = 0
    end = steps
    if SPLIT_K > 1:
        share = tl.cdiv(steps, tl.num_programs(1))
        begin = tl.program_id(1) * share
        end = tl.minimum(begin + share, steps)
    return begin, end


@triton_op("qcompile_triton::scaled_mm", mutates_args=())
def scaled_mm_op(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    tiles: list[int],
) -> Tensor:
    """x [M, K], weight [N, K] → [M, N] of out_dtype. x_scale [M] or [], residual [M, N], any strides.

    tiles: as `tiles.by_bucket` makes them, or one entry of that.
    """
    if x.shape[0] == 0:
        return x.new_empty((0, weight.shape[0]), dtype=out_dtype)
    tile = pick(tiles, x.shape[0])
    operands = x, weight, x_scale, weight_scale, bias, residual
    if tile.cublas and not scaled_mm_cublas.takes(x, weight, x_scale, bias, residual, activation, out_dtype):
        library: Tensor = scaled_mm_cublas.scaled_mm_op(x, weight, x_scale, weight_scale, bias)
        return library
    if tile.hopper and (hopper := _hopper()) is not None:
        y: Tensor = hopper.scaled_mm_op(*operands, activation, out_dtype, tile.to_ints())
        return y
    out, grid, arguments, constants = prepare(operands, activation, out_dtype, tile)
    # Interpreted kernels are plain functions, which torch 2.11 does not wrap.
    kernel = wrap_triton(scaled_mm_kernel) if isinstance(scaled_mm_kernel, triton.JITFunction) else scaled_mm_kernel
    kernel[grid](*arguments, **constants)
    if tile.split == 1:
        return out
    # Plain PyTorch, in a fixed order: Inductor fuses it with whatever reads the result.
    sums = out.sum(0, dtype=out.dtype)
    return epilogue(sums, x_scale, weight_scale, bias, residual, activation or None, out_dtype)


@functools.cache
def _hopper() -> Any:
    """The module with the kernel in Gluon, an experimental part of Triton; None if this Triton has another Gluon."""
    try:
        return importlib.import_module("qcompile.lowering.scaled_mm_hopper")
    except ImportError:
        return None


def launch_of(
    operands: Operands, activation: str, out_dtype: torch.dtype, tile: Tile
) -> tuple[Any, Tensor, tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """The kernel that a tile means, and what its launch needs. Operands that TMA cannot read have no other than this
    module's, in the same tile."""
    hopper = _hopper() if tile.hopper and can_use_tma(operands[0]) and can_use_tma(operands[1]) else None
    if hopper is not None:
        return hopper.scaled_mm_kernel, *hopper.prepare(operands, activation, out_dtype, tile)
    return scaled_mm_kernel, *prepare(operands, activation, out_dtype, tile)


def prepare(
    operands: Operands, activation: str, out_dtype: torch.dtype, tile: Tile
) -> tuple[Tensor, tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """What a launch needs, and nothing launched: a new result, the grid, arguments and constants of the kernel.

    operands: x, weight, x_scale, weight_scale, bias and residual, as of `scaled_mm_op`. The result is [M, N] of
    out_dtype, or, if the tile splits K, for the sums of the parts: [parts, M, N], int32 or float32.
    """
    x, weight = operands[:2]
    (m, k), n = x.shape, weight.shape[0]
    tensors, strides, constants = common(operands, activation, tile)
    is_int8 = x.dtype == torch.int8
    shape, dtype = ((m, n), out_dtype) if tile.split == 1 else ((tile.split, m, n), _accumulator(is_int8))
    out = x.new_empty(shape, dtype=dtype)
    count = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    grid = (count, tile.split)
    tma = tile.tma and can_use_tma(x) and can_use_tma(weight)
    if tma:
        set_workspace()
    sizes = m, n, k, x.stride(0), x.stride(1), weight.stride(0), weight.stride(1)
    constants |= {
        "EVEN_K": k % tile.block_k == 0, "SPLIT_K": min(tile.split, 2), "SWAP": tile.swap, "TMA": tma,
        "num_stages": tile.stages,
    }  # fmt: skip
    return out, grid, (x, weight, *tensors, out, *sizes, *strides, tile.group), constants


def common(
    operands: Operands, activation: str, tile: Tile
) -> tuple[tuple[Tensor, ...], tuple[int, int, int], dict[str, Any]]:
    """What this kernel and Hopper's are launched with alike: x_scale, weight_scale, bias and residual, with something
    unread for what is not there; the strides scale_row, residual_row and residual_column; and constants."""
    x, _, x_scale, weight_scale, bias, residual = operands
    weight_scale = weight_scale.contiguous()
    tensors = (
        x_scale.contiguous(), weight_scale, weight_scale if bias is None else bias.contiguous(),
        weight_scale if residual is None else residual,
    )  # fmt: skip
    row, column = (0, 0) if residual is None else residual.stride()
    constants = {
        "IS_INT8": x.dtype == torch.int8, "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None,
        "ACTIVATION": activation, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "num_warps": tile.warps,
    }  # fmt: skip
    return tensors, (1 if x_scale.ndim else 0, row, column), constants


def _accumulator(is_int8: bool) -> torch.dtype:
    return torch.int32 if is_int8 else torch.float32


def can_use_tma(operand: Tensor) -> bool:
    """Whether the rows of an 8-bit operand lie where TMA can read them: whole, apart, at multiples of 16 bytes."""
    start = operand.storage_offset() if is_fake(operand) else operand.data_ptr()
    apart = operand.stride(0) >= operand.shape[1] and operand.stride(0) % 16 == 0
    return operand.stride(1) == 1 and apart and start % 16 == 0


def set_workspace() -> None:
    """Let this thread's launches have memory for descriptors; others have none, and Inductor sets it once only."""
    triton.set_allocator(_workspace)


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors of a launch."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@scaled_mm_op.register_fake
def fake(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    tiles: list[int],
) -> Tensor:
    """A result [M, N] of out_dtype with nothing in it, of this operator and of Hopper's."""
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)
