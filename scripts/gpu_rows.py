"""One stage of the GPU benchmark, in a process of its own: prints one JSON object per row as soon as it is measured.

A row that fails is a row with an error. `scripts/gpu.py` starts the stages and makes a page of the rows.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

# (N, K) of the products of a layer, siblings merged.
SHAPES = {
    "8B qkv": (6144, 4096), "8B o": (4096, 4096), "8B gate_up": (28672, 4096), "8B down": (4096, 14336),
    "70B qkv": (10240, 8192), "70B o": (8192, 8192), "70B gate_up": (57344, 8192), "70B down": (8192, 28672),
}  # fmt: skip
TOKENS = (1, 16, 32, 128, 512, 2048, 8192)
PRODUCTS = ("triton int8", "triton fp8", "_scaled_mm fp8", "_int_mm + scales", "bf16 matmul")
LOOKS = 9  # at every variant, in turns
NORM_TOKENS = (1, 32, 1024, 2048, 8192)
NORMS = ("norm bf16", "norm + quantize int8", "norm + quantize fp8")
TUNED_TOKENS = (1, 32, 128, 512, 2048, 8192)
Row = dict[str, Any]
Measure = Callable[[], float]


def row(stage: str, name: str, tokens: int, variant: str, measure: Measure) -> Row:
    """One measured row, or one that says why there is no number."""
    found: Row = {"stage": stage, "name": name, "tokens": tokens, "variant": variant, "value": None, "error": ""}
    try:
        found["value"] = measure()
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
    return found


def unmeasured(stage: str, name: str, variant: str, reason: str) -> Row:
    """What stands for rows that were not begun."""
    return {"stage": stage, "name": name, "tokens": 0, "variant": variant, "value": None, "error": reason}


def product_rows(
    clock_of: Callable[[str, int, int, int], Measure], by_cublas: Callable[[int, int, int], bool]
) -> Iterator[Row]:
    """Every shape, number of tokens and form of product; microseconds. clock_of: variant, M, N, K → a clock, each look
    at which takes the time anew. Variants are looked at in turns, so that what disturbs one disturbs all. by_cublas: M,
    N, K → whether our fp8 product is cuBLAS's own, which its row then says."""
    for name, (n, k) in SHAPES.items():
        for m in sorted({*TOKENS, *(NORM_TOKENS if name.endswith("qkv") else ())}):  # what norms are compared with
            clocks: dict[str, Measure] = {}
            failed: list[Row] = []
            for variant in PRODUCTS:
                try:
                    clocks[variant] = clock_of(variant, m, n, k)
                except Exception as error:
                    failed.append(row("products", name, m, variant, functools.partial(_fail, error)))
            looks: dict[str, list[float]] = {variant: [] for variant in clocks}
            for _ in range(LOOKS):
                for variant, clock in clocks.items():
                    looks[variant].append(clock())
            for variant, times in looks.items():
                found = row("products", name, m, variant, functools.partial(statistics.median, times))
                yield found | ({"cublas": True} if variant == "triton fp8" and by_cublas(m, n, k) else {})
            yield from failed


def _fail(error: Exception) -> float:
    raise error


def tune_rows(search: Iterable[Any], keep: Callable[[list[Any]], None], is_over: Callable[[], bool]) -> Iterator[Row]:
    """The fastest tile of every product, and what the heuristic one takes; microseconds. search: `tuning.search`. keep:
    called with all that was found after every product, since nobody knows which is the last. is_over: no time is left.
    """
    found: list[Any] = []
    names = {shape: name for name, shape in SHAPES.items()}
    search = iter(search)
    while True:
        if is_over():
            yield unmeasured("tune", "what is left", "tiles", "out of time")
            return
        if (best := next(search, None)) is None:
            return
        found.append(best)
        if best.tile is not None:
            keep(found)
        name = names[best.n, best.k]
        yield row("tune", name, best.m, f"heuristic {best.dtype}", functools.partial(_value, best.heuristic))
        yield row("tune", name, best.m, f"tuned {best.dtype}", functools.partial(_value, best.time))
        if best.tile is not None and best.tile.cublas:
            yield row("tune", name, best.m, f"own {best.dtype}", functools.partial(_value, best.own))


def _value(time: float) -> float:
    if time == float("inf"):
        raise RuntimeError("no tile ran")
    return time


def norm_rows(measure: Callable[[str, int, int], float]) -> Iterator[Row]:
    """RMSNorm alone and with the quantize step behind it; microseconds. measure: variant, M, K."""
    for name, width in (("8B", 4096), ("70B", 8192)):
        for m in NORM_TOKENS:
            for variant in NORMS:
                yield row("norms", name, m, variant, functools.partial(measure, variant, m, width))


def clock_product(variant: str, m: int, n: int, k: int) -> Measure:
    """A clock of one variant, whose operands are rotated through more memory than the cache holds."""
    from qcompile.bench.gpu_timing import clock_of, copies, microseconds

    size = n * k * (2 if variant == "bf16 matmul" else 1)
    count = copies(size, torch.cuda.get_device_properties().L2_cache_size)
    make = _product(variant, m, n, k)
    calls = [make(seed) for seed in range(count)]
    return clock_of(calls, microseconds(calls, budget=0.0))


def _product(variant: str, m: int, n: int, k: int) -> Callable[[int], Callable[[], Any]]:
    """A maker of calls: each call has operands of its own."""
    from qcompile.bench import gpu_timing

    x_scale, weight_scale = torch.full((m,), 1e-2, device="cuda"), torch.full((n,), 1e-2, device="cuda")

    def int8(rows: int, seed: int) -> torch.Tensor:
        return gpu_timing.random(rows, k, "int8", seed)

    def fp8(rows: int, seed: int) -> torch.Tensor:
        return gpu_timing.random(rows, k, "fp8", seed)

    if variant.startswith("triton"):
        dtype = variant.removeprefix("triton ")
        call, operand = gpu_timing.product(_tile(m, n, k, dtype)), int8 if dtype == "int8" else fp8

        def ours(seed: int) -> Callable[[], Any]:
            return functools.partial(call, (operand(m, seed), operand(n, seed + 1), x_scale, weight_scale))

        return ours
    if variant == "_scaled_mm fp8":

        def rowwise(seed: int) -> Callable[[], Any]:
            x, weight = fp8(m, seed), fp8(n, seed + 1).t()
            scales = x_scale[:, None], weight_scale[None, :]
            return lambda: torch._scaled_mm(x, weight, *scales, out_dtype=torch.bfloat16, use_fast_accum=True)

        return rowwise
    if variant == "_int_mm + scales":
        if m <= 16:
            raise ValueError("torch._int_mm takes more than 16 rows only")

        def separate(seed: int) -> Callable[[], Any]:
            x, weight = int8(m, seed), int8(n, seed + 1).t()
            return lambda: _scaled(torch._int_mm(x, weight), x_scale, weight_scale)

        return separate

    def plain(seed: int) -> Callable[[], Any]:
        x, weight = (torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for rows in (m, n))
        return lambda: torch.nn.functional.linear(x, weight)

    return plain


def _tile(m: int, n: int, k: int, dtype: str) -> Any:
    """What the backend would take here for a product of a layer."""
    from qcompile.lowering.tiles import choose_tile

    target, device = _here()
    tile = choose_tile(m, n, k, dtype, device, name=target.name)
    residual = any(name.endswith((" o", " down")) for name, shape in SHAPES.items() if shape == (n, k))
    return dataclasses.replace(tile, cublas=False) if residual else tile  # which cuBLAS does not add


def _here() -> tuple[Any, Any]:
    from qcompile.lowering.devices import device_of
    from qcompile.lowering.target import detect

    target = detect(torch.device("cuda", 0))
    device = device_of(target)
    assert device is not None
    return target, device


@functools.cache
def _scaling() -> Callable[..., Any]:
    def scale(sums: torch.Tensor, x_scale: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
        return (sums.to(torch.float32) * (x_scale[:, None] * weight_scale)).to(torch.bfloat16)

    return torch.compile(scale, dynamic=True)


def _scaled(sums: torch.Tensor, x_scale: torch.Tensor, weight_scale: torch.Tensor) -> Any:
    return _scaling()(sums, x_scale, weight_scale)


def measure_norm(variant: str, m: int, width: int) -> float:
    """The norm as any model has it; with the quantize step, the kernel that the backend gets."""
    from qcompile import ops
    from qcompile.bench.gpu_timing import microseconds
    from qcompile.lowering.inductor_choices import whole_rows
    from qcompile.lowering.select import inlined
    from qcompile.lowering.target import detect

    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(variant.rpartition(" ")[2])
    quantize = inlined(detect(torch.device("cuda", 0)), ops.quantize)

    def norm(x: torch.Tensor, gain: torch.Tensor) -> Any:
        y = torch.nn.functional.rms_norm(x, (width,), gain, 1e-6)
        return y if dtype is None else quantize(y, [], "row", dtype)

    compiled = torch.compile(norm, dynamic=False)
    x, gain = torch.randn(m, width, device="cuda", dtype=torch.bfloat16), torch.ones(width, device="cuda")
    gain = gain.to(torch.bfloat16)
    with contextlib.nullcontext() if dtype is None else whole_rows():
        compiled(x, gain)
    return microseconds([lambda: compiled(x, gain)])


def sanitize() -> None:
    """Every form of our kernels on small odd shapes, for compute-sanitizer to watch."""
    sys.path.insert(0, "tests")
    from attention_checks import MASKS, Case, check
    from kernel_checks import FORMS, check_int8_sums, product

    for tile in FORMS.values():
        for shape in ((1, 1, 1), (17, 33, 65), (33, 130, 31)):
            check_int8_sums(product(*shape, device="cuda"), tile)
    for mask in MASKS:
        check(Case(mask=mask, keys=33, channels=24, parts=2), "cuda")
    print(json.dumps({"stage": "sanitize", "name": "ran"}))


def tune_here(seconds: float) -> Iterator[Row]:
    """Measure the tiles of SHAPES on this card into its table in lowering/tiles, as long as there is time."""
    from qcompile.atomic_file import write_file
    from qcompile.bench import tuning
    from qcompile.lowering import tiles

    began = time.monotonic()
    target, device = _here()
    dtypes = ["int8", "fp8"] if device.fp8 else ["int8"]
    path = tiles.card_path(target.name)
    before = tiles.load(path).rows if path.exists() else ()

    def keep(found: list[Any]) -> None:
        rows = [made for best in found if (made := best.row()) is not None]
        again = {(made.dtype, made.m, made.n, made.k) for made in rows}
        kept = [old for old in before if (old.dtype, old.m, old.n, old.k) not in again]
        write_file(path, tuning.table_of([*kept, *rows], target).to_json())

    bench = tuning.Bench(target)
    bench.compile_ahead(SHAPES.values(), TUNED_TOKENS, dtypes, lambda line: print(line, file=sys.stderr, flush=True))
    print(f"compiled after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    search = tuning.search(SHAPES.values(), TUNED_TOKENS, dtypes, target, bench.measure)
    yield from tune_rows(search, keep, lambda: time.monotonic() - began > seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("tune", "products", "norms", "sanitize"))
    parser.add_argument("--seconds", type=float, default=100, help="when tune begins no further product (default 100)")
    arguments = parser.parse_args()
    torch._dynamo.config.recompile_limit = 10_000
    if arguments.stage == "sanitize":
        sanitize()
        return
    rows = {
        "tune": lambda: tune_here(arguments.seconds),
        "products": lambda: product_rows(clock_product, lambda m, n, k: _tile(m, n, k, "fp8").cublas),
        "norms": lambda: norm_rows(measure_norm),
    }[arguments.stage]()
    for found in rows:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
