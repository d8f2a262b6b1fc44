"""The Triton kernel of scaled_mm. Needs triton to be imported: only `scaled_mm_triton` and tests do that, late.

One program computes one tile of the output, or, in the persistent form, every so-many-th tile. Sums are int32 for int8
and float32 for fp8. Without split-K the epilogue runs on the sums in registers; with it, each program stores the sums
of its share of K, and what adds them up is plain PyTorch.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
import triton
import triton.language as tl


@triton.jit
def scaled_mm_kernel(
    x, weight, x_scale, weight_scale, bias, residual, out,
    M, N, K, x_row, x_column, weight_row, weight_column, scale_row, residual_row, residual_column,
    IS_INT8: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SPLIT_K: tl.constexpr, SWAP: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """x [M, K], weight [N, K] → out [M, N], or, if SPLIT_K > 1, partial sums out [SPLIT_K, M, N].

    Grid: (tiles, SPLIT_K), or, if PERSISTENT, any number of programs. x_row and the like are strides in elements;
    scale_row is 0 for one scale in all. bias and residual are not read unless HAS_BIAS and HAS_RESIDUAL.
    """
    if PERSISTENT:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            _one_tile(
                tile, x, weight, x_scale, weight_scale, bias, residual, out,
                M, N, K, x_row, x_column, weight_row, weight_column, scale_row, residual_row, residual_column,
                IS_INT8, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT_K, SWAP,
            )  # fmt: skip
    else:
        _one_tile(
            tl.program_id(0), x, weight, x_scale, weight_scale, bias, residual, out,
            M, N, K, x_row, x_column, weight_row, weight_column, scale_row, residual_row, residual_column,
            IS_INT8, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT_K, SWAP,
        )  # fmt: skip


@triton.jit
def _one_tile(
    tile, x, weight, x_scale, weight_scale, bias, residual, out,
    M, N, K, x_row, x_column, weight_row, weight_column, scale_row, residual_row, residual_column,
    IS_INT8: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SPLIT_K: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _place(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = _accumulate(
        x, weight, (rows % M).to(tl.int64), (columns % N).to(tl.int64), K, x_row, x_column, weight_row, weight_column,
        IS_INT8, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K, SWAP,
    )  # fmt: skip
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    long_rows = rows.to(tl.int64)
    if SPLIT_K > 1:
        part = out + tl.program_id(1).to(tl.int64) * M * N
        tl.store(part + long_rows[:, None] * N + columns[None, :], sums, mask=inside)
    else:
        row_scale = tl.load(x_scale + long_rows * scale_row, mask=rows < M, other=0.0)
        column_scale = tl.load(weight_scale + columns, mask=columns < N, other=0.0)
        y = sums.to(tl.float32) * (row_scale[:, None] * column_scale[None, :])
        if HAS_BIAS:
            y += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        y = _activate(y, ACTIVATION)
        if HAS_RESIDUAL:
            at = residual + long_rows[:, None] * residual_row + columns.to(tl.int64)[None, :] * residual_column
            y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + long_rows[:, None] * N + columns[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tiles in groups of GROUP_M rows, columns first: neighbours in time share operands in L2."""
    in_group = GROUP_M * tiles_n
    first = tile // in_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % in_group % height, tile % in_group // height


@triton.jit
def _accumulate(
    x, weight, rows, columns, K, x_row, x_column, weight_row, weight_column,
    IS_INT8: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCK_M, BLOCK_N] over this program's share of K. Past the end of K both operands are zeros.

    SWAP multiplies weight by xᵀ: with few rows of x, the weight's rows fill the matrix instruction's 64.
    """
    dtype: tl.constexpr = tl.int32 if IS_INT8 else tl.float32
    if SWAP:
        left, right, left_rows, right_rows = weight, x, columns, rows
        left_row, left_column, right_row, right_column = weight_row, weight_column, x_row, x_column
        sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=dtype)
    else:
        left, right, left_rows, right_rows = x, weight, rows, columns
        left_row, left_column, right_row, right_column = x_row, x_column, weight_row, weight_column
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=dtype)
    steps = tl.cdiv(K, BLOCK_K)
    if SPLIT_K > 1:
        share = tl.cdiv(steps, SPLIT_K)
        begin = tl.program_id(1) * share
        end = tl.minimum(begin + share, steps)
    else:
        begin = 0
        end = steps
    inner = tl.arange(0, BLOCK_K)
    left += left_rows[:, None] * left_row + inner[None, :] * left_column
    right += right_rows[None, :] * right_row + inner[:, None] * right_column
    for step in range(begin, end):
        at = step.to(tl.int64) * BLOCK_K
        if EVEN_K:
            a = tl.load(left + at * left_column)
            b = tl.load(right + at * right_column)
        else:
            valid = inner < K - at
            a = tl.load(left + at * left_column, mask=valid[None, :], other=0)
            b = tl.load(right + at * right_column, mask=valid[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=dtype)
    if SWAP:
        sums = tl.trans(sums)
    return sums


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    """qcompile.ops.ACTIVATIONS, by name; "" is none."""
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # keeps NaN
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))  # (1 + tanh(u)) / 2 = sigmoid(2u)
    return y
