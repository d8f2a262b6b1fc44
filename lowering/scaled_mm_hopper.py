"""scaled_mm for sm90 and many tokens: the kernel that keeps `wgmma` busy, in Gluon, and its operator. Imports triton.

Triton by itself lets every int8 `wgmma` finish before it issues the next (its pipeliner takes only float32 sums to be
asynchronous), and loads, multiplies and stores with the same warps. Here one warp loads, by TMA, into a ring of stages;
the others multiply, with one `wgmma` on its way while the next is issued; and a program goes on to its next tile, whose
operands are being loaded while it finishes the last. Eight warps share a tile; twice four take turns, so that one
multiplies while the other writes its results. As CUTLASS's cooperative and ping-pong kernels (docs.nvidia.com/cutlass,
"Efficient GEMM"), without clusters.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qcompile.lowering import scaled_mm_steps
from qcompile.lowering.scaled_mm_kernel import Operands, common, fake, launch_of
from qcompile.lowering.tiles import Tile

place, finish = gluon.jit(scaled_mm_steps.place), gluon.jit(scaled_mm_steps.finish)
# Of each thread of a warp that loads, the fewest there can be; and of one that multiplies, where two groups take turns.
LOADING_REGISTERS, MULTIPLYING_REGISTERS = 24, 240
# Columns that the epilogue writes at a time: the more, the more of a line; as many as the registers allow.
COLUMNS = {"": 64, "relu": 32, "silu": 32, "gelu": 16, "gelu_tanh": 32}


@gluon.jit(do_not_specialize=["M", "GROUP_M"])
def scaled_mm_kernel(
    x, weight, x_scale, weight_scale, bias, residual, out, M, N, K, scale_row, residual_row, residual_column, GROUP_M,
    IS_INT8: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    COLUMNS: gl.constexpr, LOADING_REGISTERS: gl.constexpr, MULTIPLYING_REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """x [M, K], weight [N, K], by descriptors of blocks [BLOCK_M or BLOCK_N, BLOCK_K] → out [M, N].

    Grid: any number of programs, each of which computes every so-many-th tile. Other arguments as of the kernel for all
    GPUs.
    """
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    weights = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_N, BLOCK_K], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    for turn in gl.static_range(2):
        mbarrier.init(turns.index(turn), count=1)
    stages = xs, weights, full, free, turns
    operands = x_scale, weight_scale, bias, residual, out
    # Strides that may be constants go by themselves: in a tuple Triton 3.6 forgets that they are 1, and reads residuals
    # element by element.
    sizes = M, N, K, residual_row, GROUP_M
    loading = x, weight, stages, M, N, K, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K, STAGES
    if num_warps == 4:
        gl.warp_specialize([
            (_multiply, (
                stages, operands, sizes, scale_row, residual_column, IS_INT8, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, COLUMNS, num_warps, 0, 2,
            )),
            (_multiply, (
                stages, operands, sizes, scale_row, residual_column, IS_INT8, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, COLUMNS, num_warps, 1, 2,
            )),
            (_load, loading),
        ], [4, 1], [MULTIPLYING_REGISTERS, LOADING_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (
                stages, operands, sizes, scale_row, residual_column, IS_INT8, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, COLUMNS, num_warps, 0, 1,
            )),
            (_load, loading),
        ], [1], [LOADING_REGISTERS])  # fmt: skip


@gluon.jit
def _load(
    x, weight, stages, M, N, K, GROUP_M,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: both operands of every step of every tile, as soon as there is a free stage. What lies outside of an
    operand arrives as zeros."""
    xs, weights, full, free, _ = stages
    tiles_m, tiles_n, steps = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), gl.cdiv(K, BLOCK_K)
    loaded = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = place(tile, tiles_m, tiles_n, GROUP_M)
        for step in range(steps):
            stage = loaded % STAGES
            arrival = full.index(stage)
            mbarrier.wait(free.index(stage), ((loaded // STAGES) & 1) ^ 1)
            mbarrier.expect(arrival, x.block_type.nbytes + weight.block_type.nbytes)
            tma.async_copy_global_to_shared(x, [tile_m * BLOCK_M, step * BLOCK_K], arrival, xs.index(stage))
            tma.async_copy_global_to_shared(weight, [tile_n * BLOCK_N, step * BLOCK_K], arrival, weights.index(stage))
            loaded += 1


@gluon.jit
def _multiply(
    stages, operands, sizes, scale_row, residual_column, IS_INT8: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr, TURN: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """WARPS warps: sums of every tile of the program's, or of those whose turn it is, and their epilogues."""
    xs, weights, full, free, turns = stages
    x_scale, weight_scale, bias, residual, out = operands
    M, N, K, residual_row, GROUP_M = sizes
    # The widest instruction is 256 columns; Triton has it 128 wide for int8.
    WIDTH: gl.constexpr = min(BLOCK_N, 128 if IS_INT8 else 256)
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 32])
    tiles_m, tiles_n, steps = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), gl.cdiv(K, BLOCK_K)
    programs = gl.num_programs(0)
    used, turn = TURN * steps, 0
    for tile in range(gl.program_id(0) + TURN * programs, tiles_m * tiles_n, TURNS * programs):
        sums = gl.zeros((BLOCK_M, BLOCK_N), gl.int32 if IS_INT8 else gl.float32, LAYOUT)
        if TURNS > 1:
            # Of a stage's barrier one sees whether an even or an odd number of loads has arrived: who waits for a load
            # must have seen all before it, or know of somebody who has.
            mbarrier.wait(turns.index(TURN), (turn & 1) ^ (1 - TURN))
            turn += 1
        for step in range(steps):
            stage = used % STAGES
            mbarrier.wait(full.index(stage), (used // STAGES) & 1)
            going = warpgroup_mma(xs.index(stage), weights.index(stage).permute((1, 0)), sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=(going,))
            # The step before has been multiplied now.
            mbarrier.arrive(free.index((used + STAGES - 1) % STAGES), pred=step > 0)
            used += 1
        if TURNS > 1:
            mbarrier.arrive(turns.index(1 - TURN))
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(free.index((used + STAGES - 1) % STAGES))
        used += (TURNS - 1) * steps
        tile_m, tile_n = place(tile, tiles_m, tiles_n, GROUP_M)
        row, column = (tile_m * BLOCK_M).to(gl.int64), (tile_n * BLOCK_N).to(gl.int64)
        _write(
            sums, 0, x_scale + row * scale_row, weight_scale + column, bias + column,
            residual + row * residual_row + column * residual_column, out + row * N + column,
            N, (M - row).to(gl.int32), (N - column).to(gl.int32), scale_row, residual_row, residual_column,
            HAS_BIAS, HAS_RESIDUAL, ACTIVATION, BLOCK_M, BLOCK_N, COLUMNS, WARPS,
        )  # fmt: skip


@gluon.jit
def _write(
    sums, start, x_scale, weight_scale, bias, residual, out, N, height, width, scale_row, residual_row, residual_column,
    HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The results of BLOCK_N columns from `start` on, COLUMNS at a time; pointers are at the tile's corner."""
    if BLOCK_N > COLUMNS:
        left, right = gl.split(gl.permute(gl.reshape(sums, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        _write(
            left, start, x_scale, weight_scale, bias, residual, out, N, height, width, scale_row, residual_row,
            residual_column, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, BLOCK_M, BLOCK_N // 2, COLUMNS, WARPS,
        )  # fmt: skip
        _write(
            right, start + BLOCK_N // 2, x_scale, weight_scale, bias, residual, out, N, height, width, scale_row,
            residual_row, residual_column, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, BLOCK_M, BLOCK_N // 2, COLUMNS, WARPS,
        )  # fmt: skip
    else:
        # A thread of `wgmma` holds pairs of sums; here eight in a row, so that a warp reads and writes whole sectors.
        LINES: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BLOCK_N, BLOCK_N // 8], [WARPS, 1], [1, 0])
        rows = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LINES))
        columns = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LINES))
        y = finish(
            gl.convert_layout(sums, LINES), rows, columns, x_scale, weight_scale, bias, residual, height, width,
            scale_row, residual_row, residual_column, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip
        inside = (rows < height)[:, None] & (columns < width)[None, :]
        gl.store(out + (rows[:, None] * N + columns[None, :]), y.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("qcompile_hopper::scaled_mm", mutates_args=(), device_types="cuda")
def scaled_mm_op(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    tile: list[int],
) -> Tensor:
    """x [M, K], weight [N, K] → [M, N] of out_dtype. x_scale [M] or [], residual [M, N], any strides.

    No `triton_op`: Inductor knows no Gluon. tile: `Tile.to_ints`. Operands that TMA cannot read go to the kernel for
    all GPUs, in the same tile.
    """
    operands = x, weight, x_scale, weight_scale, bias, residual
    kernel, out, grid, arguments, constants = launch_of(operands, activation, out_dtype, Tile.from_ints(tile))
    kernel[grid](*arguments, **constants)
    return out


def prepare(
    operands: Operands, activation: str, out_dtype: torch.dtype, tile: Tile
) -> tuple[Tensor, tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """As `prepare` of scaled_mm_kernel, for one program per multiprocessor, or fewer."""
    x, weight = operands[:2]
    (m, k), n = x.shape, weight.shape[0]
    tensors, strides, constants = common(operands, activation, tile)
    out = x.new_empty((m, n), dtype=out_dtype)
    blocks = _blocks(x, tile.block_m, tile.block_k), _blocks(weight, tile.block_n, tile.block_k)
    count = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    constants |= {
        "STAGES": tile.stages, "COLUMNS": COLUMNS[activation], "LOADING_REGISTERS": LOADING_REGISTERS,
        "MULTIPLYING_REGISTERS": MULTIPLYING_REGISTERS,
    }  # fmt: skip
    arguments = *blocks, *tensors, out, m, n, k, *strides, tile.group
    return out, (min(count, _processors(x.device)), 1), arguments, constants


def _blocks(operand: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """An 8-bit operand for TMA, in blocks laid out as `wgmma` reads them."""
    dtype = {torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv, torch.float8_e5m2: gl.float8e5}[operand.dtype]
    shape = [rows, columns]
    return TensorDescriptor.from_tensor(operand, shape, gl.NVMMASharedLayout.get_default_for(shape, dtype))


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


scaled_mm_op.register_fake(fake)
