"""What the Triton kernel and that for Hopper share: plain functions, which each compiles into itself.

As functions of no particular layout of registers they are given the numbers of rows and columns by their callers.
Imports triton.
"""

# mypy: disable-error-code="no-untyped-def, misc"
import triton.language as tl


def place(tile, tiles_m, tiles_n, GROUP_M):
    """Tiles in groups of GROUP_M rows, columns first: neighbours in time share operands in L2."""
    in_group = GROUP_M * tiles_n
    first = tile // in_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % in_group % height, tile % in_group // height


def finish(
    sums, rows, columns, x_scale, weight_scale, bias, residual, height, width, scale_row, residual_row,
    residual_column, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The epilogue (qcompile.products) of sums at rows × columns of a tile; pointers are at the tile's corner.

    ACTIVATION: qcompile.products.ACTIVATIONS, by name; "" is none. Returns float32.
    """
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    row_scale = tl.load(x_scale + rows * scale_row, mask=rows < height, other=0.0)
    column_scale = tl.load(weight_scale + columns, mask=columns < width, other=0.0)
    y = sums.to(tl.float32) * (row_scale[:, None] * column_scale[None, :])
    if HAS_BIAS:
        y += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # keeps NaN
    elif ACTIVATION == "silu":
        y = y * (1 / (1 + tl.exp(-y)))
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2u)
        y = y * (1 / (1 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y))))
    if HAS_RESIDUAL:
        at = rows[:, None] * residual_row + columns[None, :] * residual_column
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    return y
