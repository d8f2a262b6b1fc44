"""What the kernels must compute, on whatever device runs them: Triton's interpreter on a CPU, or a GPU."""

import dataclasses

import torch
from torch import Tensor

from qcompile import ops
from qcompile.lowering import scaled_mm_kernel as kernel
from qcompile.lowering.tiles import Tile

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
SMALL = Tile(16, 16, 32, warps=4, stages=2, group=2)
# Every form of the kernel, in tiles small enough that odd shapes need several.
FORMS = {
    "plain": SMALL,
    "swap": dataclasses.replace(SMALL, swap=True),
    "split": dataclasses.replace(SMALL, split=4),
    "split swap": dataclasses.replace(SMALL, split=2, swap=True),
    "tma": dataclasses.replace(SMALL, tma=True),
    "tma split swap": dataclasses.replace(SMALL, split=2, swap=True, tma=True),
    "halves": Tile(128, 256, 32, warps=8, stages=2),  # large enough for the epilogue in two halves
}

# Those of the kernel for Hopper, which nothing interprets: a GPU only. Few stages, so that odd shapes go round them.
HOPPER_FORMS = {
    "hopper": Tile(64, 64, 32, warps=4, stages=2, group=2, hopper=True),
    "hopper wide": Tile(64, 256, 64, warps=4, stages=3, hopper=True),
    "hopper large": Tile(256, 128, 128, warps=8, stages=4, hopper=True),
}


@dataclasses.dataclass
class Product:
    """Operands of one scaled_mm, on the device that runs it."""

    x: Tensor
    weight: Tensor
    x_scale: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    activation: str | None = None
    out_dtype: torch.dtype = torch.float32

    def run(self, tile: Tile) -> Tensor:
        """What the kernel computes; operands are laid out so that a tile with TMA does use it."""
        tma = tile.tma or tile.hopper
        x, weight = (apart(t) if tma and len(t) else t for t in (self.x, self.weight))
        assert not tma or len(x) == 0 or all(map(kernel.can_use_tma, (x, weight)))
        operands = x, weight, self.x_scale, self.weight_scale, self.bias, self.residual
        return kernel.scaled_mm_op(*operands, self.activation or "", self.out_dtype, [0, *tile.to_ints()])

    def reference(self) -> Tensor:
        """The definition, on the CPU."""
        tensors = (self.x, self.weight, self.x_scale, self.weight_scale, self.bias, self.residual)
        return ops.scaled_mm(*(None if t is None else t.cpu() for t in tensors), self.activation, self.out_dtype)


def apart(operand: Tensor) -> Tensor:
    """The same values in rows that begin at multiples of 16 bytes, with the largest numbers between them."""
    k = operand.shape[1]
    largest = 127 if operand.dtype == torch.int8 else torch.finfo(operand.dtype).max
    wide = torch.full((len(operand), -(-k // 16) * 16 + 16), largest, device=operand.device).to(operand.dtype)
    wide[:, :k] = operand
    return wide[:, :k]


def product(
    m: int, n: int, k: int, dtype: str = "int8", *, per_token: bool = True, device: str = "cpu", seed: int = 0
) -> Product:
    """Random operands, the extreme values of int8 (−128 in the weight too) among them."""
    random = torch.Generator().manual_seed(seed)
    if dtype == "int8":
        x = torch.randint(-127, 128, (m, k), generator=random).to(torch.int8)
        weight = torch.randint(-128, 128, (n, k), generator=random).to(torch.int8)
    else:
        x, weight = (torch.randn(rows, k, generator=random) for rows in (m, n))
        if dtype == "fp8_e5m2" and device == "cpu":  # whose subnormal numbers are zeros to Triton's interpreter
            x, weight = (torch.where(t.abs() < 2**-14, 0, t) for t in (x, weight))
        x, weight = x.to(DTYPES[dtype]), weight.to(DTYPES[dtype])
    x_scale = torch.rand(m, generator=random) * 1e-2 if per_token else torch.tensor(3e-3)
    weight_scale = torch.rand(n, generator=random) * 1e-2
    return Product(*(t.to(device) for t in (x, weight, x_scale, weight_scale)))


def check_int8_sums(found: Product, tile: Tile) -> None:
    """Sums are exact, whatever float32 could hold of them: two products with weights split into high and low parts.

    With scales of 1 and float32 results, sums below 2^24 come out unrounded.
    """
    found = dataclasses.replace(
        found, x_scale=torch.ones_like(found.x_scale), weight_scale=torch.ones_like(found.weight_scale)
    )
    exact = found.x.cpu().long() @ found.weight.cpu().long().T
    assert exact.abs().amax().item() < 2**24 if exact.numel() else True, "choose K so that float32 holds the sums"
    assert torch.equal(found.run(tile).cpu().long(), exact)


def fp8_bound(found: Product, accumulation: float) -> Tensor:
    """How far sums may be from the exact ones: each of K additions rounds by `accumulation`, relative to Σ|x||w|."""
    size = found.x.cpu().to(torch.float64).abs() @ found.weight.cpu().to(torch.float64).abs().T
    scale = found.x_scale.cpu().reshape(-1, 1).double() * found.weight_scale.cpu().double()
    return size * scale * (accumulation * found.x.shape[1] + 2**-22)


def check_fp8(found: Product, tile: Tile, bound: Tensor | None = None) -> None:
    """fp8 within a bound; that of float32 accumulation in any order unless told."""
    exact = found.x.cpu().to(torch.float64) @ found.weight.cpu().to(torch.float64).T
    exact *= found.x_scale.cpu().reshape(-1, 1).double() * found.weight_scale.cpu().double()
    bound = fp8_bound(found, 2**-24) if bound is None else bound
    assert ((found.run(tile).cpu().double() - exact).abs() <= bound).all()


def fraction_bits(capability: int) -> int:
    """How many bits below the largest a GPU's fp8 matrix instruction keeps of what it adds.

    Ada and Hopper align the sum so far and the products of one instruction to the largest among them and cut off what
    is more than 13 bits below (as others found by probing them; a test compares with cuBLAS).
    Others add as float32 does, where no fewer than 22 bits remain.
    """
    return 13 if capability in (89, 90) else 22


def aligned_bound(found: Product, bits: int, group: int = 32) -> Tensor:
    """How far sums [M, N] may be from the exact ones if every instruction adds `group` products to the sum so far, each
    cut off `bits` below the largest; whatever part of K the sum began with."""
    x, weight = found.x.cpu().double(), found.weight.cpu().double()
    largest = bound = sums = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for begin in range(0, x.shape[1], group):
        left, right = x[:, begin : begin + group], weight[:, begin : begin + group]
        sums = sums + left @ right.T
        largest = torch.maximum(largest, 2 * sums.abs())  # a part of K: the difference of two sums from the start
        for i in range(left.shape[1]):
            largest = torch.maximum(largest, left[:, i, None].abs() * right[:, i].abs())
        bound = bound + (group + 1) * 2.0**-bits * largest
    size = x.abs() @ weight.abs().T
    return (bound + 2**-22 * size) * found.x_scale.cpu().reshape(-1, 1).double() * found.weight_scale.cpu().double()


def aligned_error(k: int, bits: int) -> float:
    """The relative error, at most, of sums of k products of random signs that are added as in `aligned_bound`.

    After i products the sum is about σ√i, so that what is cut off each product there has variance (2^-bits σ√i)² / 3 at
    most. Over k products that makes 2^-bits σk / √6, of a sum of σ√k.
    """
    return float(2.0**-bits * (k / 6) ** 0.5)


def check_equal(found: Product, tile: Tile) -> None:
    """As the definition, to a few roundings of float32 in the epilogue and one of the output's dtype."""
    actual, expected = found.run(tile).cpu(), found.reference()
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    known = ~undefined_by_torch(found)
    actual, expected = actual[known], expected[known]
    wide_actual, wide_expected = actual.double(), expected.double()
    assert torch.equal(wide_actual.isnan(), wide_expected.isnan())
    finite = wide_expected.isfinite() & wide_actual.isfinite()
    largest = torch.finfo(actual.dtype).max
    # A result beside the dtype's largest number may round to either side of infinity.
    mixed = wide_expected.isfinite() ^ wide_actual.isfinite()
    near = torch.where(wide_expected.isfinite(), wide_expected, wide_actual).abs() >= largest * (1 - 2**-6)
    assert (~mixed | near | wide_expected.isnan()).all()
    step = torch.finfo(actual.dtype).eps * wide_expected.abs() + torch.finfo(actual.dtype).tiny
    parts = parts_size(found)[known]  # the terms' sizes: what cancels between them leaves their rounding behind
    # Terms of an fp8 sum may cancel too; no activation is steeper than 1.2.
    summing = fp8_bound(found, 2 * 1.2 * 2**-24)[known].nan_to_num(0, 0, 0) if found.x.dtype != torch.int8 else 0
    error = (wide_actual - wide_expected).abs()
    assert (error[finite] <= (step + 2**-20 * parts + summing)[finite]).all(), error[finite].max()


def undefined_by_torch(found: Product) -> Tensor:
    """Where torch's float32 GELU depends on its input's length: above 1e38 vectors give NaN or inf, scalars not."""
    plain = dataclasses.replace(found, residual=None, activation=None, out_dtype=torch.float32).reference()
    return (plain.abs() > 1e38) & (found.activation == "gelu")


def parts_size(found: Product) -> Tensor:
    """|product| + |bias| + |residual|, elementwise, in float64."""
    plain = dataclasses.replace(found, bias=None, residual=None, activation=None, out_dtype=torch.float64)
    size = plain.reference().abs()
    if found.bias is not None:
        size = size + found.bias.cpu().double().abs()
    if found.residual is not None:
        size = size + found.residual.cpu().double().abs()
    return size.nan_to_num(0, 0, 0)


@dataclasses.dataclass
class GroupedProduct:
    """Operands of one scaled_grouped_mm, on the device that runs it."""

    x: Tensor
    weight: Tensor
    x_scale: Tensor
    weight_scale: Tensor
    offsets: Tensor
    out_dtype: torch.dtype = torch.float32

    def run(self, tile: Tile) -> Tensor:
        """What the kernel computes."""
        from qcompile.lowering.scaled_grouped_mm_kernel import scaled_grouped_mm_op

        operands = self.x, self.weight, self.x_scale, self.weight_scale, self.offsets
        return scaled_grouped_mm_op(*operands, self.out_dtype, [0, *tile.to_ints()])


def grouped_product(
    rows: tuple[int, ...],
    n: int,
    k: int,
    dtype: str = "int8",
    *,
    per_token: bool = True,
    out_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> GroupedProduct:
    """Random operands for so many rows of each expert."""
    whole = product(sum(rows), n * len(rows), k, dtype, per_token=per_token, device=device)
    offsets = torch.tensor(rows, device=device).cumsum(0).to(torch.int32)
    weight, weight_scale = whole.weight.reshape(len(rows), n, k), whole.weight_scale.reshape(len(rows), n)
    return GroupedProduct(whole.x, weight, whole.x_scale, weight_scale, offsets, out_dtype)


def check_grouped(found: GroupedProduct, tile: Tile, bits: int = 22) -> None:
    """Each expert's rows by its own matrix: to the bit for int8 in float32, else within what rounding allows.

    bits: what the device keeps of an fp8 sum (`fraction_bits`).
    """
    actual = found.run(tile).cpu()
    assert (actual.shape, actual.dtype) == ((len(found.x), found.weight.shape[1]), found.out_dtype)
    begin = 0
    for expert, end in enumerate(found.offsets.tolist()):
        scale = found.x_scale[begin:end] if found.x_scale.ndim else found.x_scale
        part = Product(found.x[begin:end], found.weight[expert], scale, found.weight_scale[expert])
        part.out_dtype, y = found.out_dtype, actual[begin:end]
        expected = part.reference()
        if found.x.dtype == torch.int8 and found.out_dtype == torch.float32:
            assert torch.equal(y, expected), f"expert {expert}"
        else:
            step = torch.finfo(found.out_dtype).eps * expected.double().abs() + torch.finfo(found.out_dtype).tiny
            summing = fp8_bound(part, 2 * 2**-24) if bits == 22 else aligned_bound(part, bits)
            bound = step + (summing if found.x.dtype != torch.int8 else 0)
            assert ((y.double() - expected.double()).abs() <= bound).all(), f"expert {expert}"
        begin = end
