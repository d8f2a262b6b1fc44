"""One stage of the GPU benchmark, in a process of its own: prints one JSON object per row as soon as it is measured.

A row that fails is a row with an error. `scripts/gpu.py` starts the stages and makes a page of the rows.
"""

import argparse
import contextlib
import functools
import gc
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
MODELS = ("inductor bf16", "w8a8 int8", "w8a8 fp8", "torchao int8", "torchao fp8")
# The most important first: a variant whose time is up has measured those.
CASES = {"decode, batch 1": (1, 1), "prefill 2048": (1, 2048), "decode, batch 32": (32, 1)}
TUNED_TOKENS = (1, 32, 128, 512, 2048, 8192)
CACHE_LENGTH = 512
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


def product_rows(clock_of: Callable[[str, int, int, int], Measure]) -> Iterator[Row]:
    """Every shape, number of tokens and form of product; microseconds. clock_of: variant, M, N, K → a clock, each look
    at which takes the time anew. Variants are looked at in turns, so that what disturbs one disturbs all."""
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
                yield row("products", name, m, variant, functools.partial(statistics.median, times))
            yield from failed


def _fail(error: Exception) -> float:
    raise error


def tune_rows(search: Iterable[Any], keep: Callable[[list[Any]], None], is_over: Callable[[], bool]) -> Iterator[Row]:
    """The fastest tile of every product, and what the heuristic one takes; microseconds. search: `tune.search`. keep:
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
    """What the backend would take here."""
    from qcompile.lowering.tiles import choose_tile

    target, device = _here()
    return choose_tile(m, n, k, dtype, device, name=target.name)


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


def answer_for(model: "Model", layers: int, words: Iterable[str], say: Callable[[Row], None]) -> None:
    """One variant in every case, as `gpu_models` asks: say that a case is ready, time it as often as told, go on."""
    said = iter(words)
    for case in CASES:
        started = time.perf_counter()
        try:
            run = model.ready(case, layers)
        except Exception as error:
            say({"failed": case, "error": f"{type(error).__name__}: {error}".partition("\n")[0][:300]})
            continue
        say({"ready": case, "seconds": time.perf_counter() - started})
        while (word := next(said, "end").strip()) == "time":
            say({"times": run()})
        if word != "next":
            return
        del run  # and what it holds


class Model:
    """A Llama of 8B's shape with random weights on the GPU, made into one variant."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self._model: Any = None

    def ready(self, case: str, layers: int) -> Callable[[], list[float]]:
        """Compile a case and warm it up. Returns what times it: milliseconds of ten calls."""
        torch._dynamo.reset()
        gc.collect()  # what the case before held
        torch.cuda.empty_cache()
        model = self._build(layers)
        arguments = _arguments(model, *CASES[case])
        forward = self._compiled(model)

        def run(calls: int = 10) -> list[float]:
            times = []
            with torch.no_grad():
                for _ in range(2 * calls):  # others were timed meanwhile: clocks and caches come up
                    forward(**arguments)
                torch.cuda.synchronize()
                for _ in range(calls):
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    start.record()
                    forward(**arguments)
                    end.record()
                    end.synchronize()
                    times.append(start.elapsed_time(end))
            return times

        run(3)
        return run

    def _build(self, layers: int) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        if self._model is None:
            config = LlamaConfig(
                hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
            )  # fmt: skip
            torch.manual_seed(0)
            with torch.device("cuda"):
                self._model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
            self._model = self._model.eval().requires_grad_(False)
            if self.variant.startswith("torchao"):
                _torchao(self._model, self.variant)
        return self._model

    def _compiled(self, model: Any) -> Callable[..., Any]:
        if self.variant.startswith("w8a8"):
            options = {"dtype": self.variant.removeprefix("w8a8 "), "mode": "reduce-overhead"}
            return torch.compile(model, backend="w8a8", options=options, dynamic=False)
        return torch.compile(model, mode="reduce-overhead", dynamic=False)


def _torchao(model: Any, variant: str) -> None:
    try:
        from torchao import quantization
    except ImportError:
        raise RuntimeError("torchao is not installed here") from None
    config = (
        quantization.Int8DynamicActivationInt8WeightConfig()
        if variant == "torchao int8"
        else quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    )
    quantization.quantize_(
        model, config, lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head"
    )


def _arguments(model: Any, batch: int, tokens: int) -> dict[str, Any]:
    from transformers import StaticCache

    ids = torch.arange(batch * tokens, device="cuda").reshape(batch, tokens) % 1000
    if tokens > 1:
        return {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
    cache = StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
    with torch.no_grad():
        model(input_ids=ids.repeat(1, 8), past_key_values=cache)
    position = torch.full((batch, 1), CACHE_LENGTH // 2, device="cuda")
    return {"input_ids": ids, "past_key_values": cache, "position_ids": position, "use_cache": True}


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
    from qcompile.commands import tune
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
        tune.write(path, tune.table_of([*kept, *rows], target))

    bench = tune.Bench(target)
    bench.compile_ahead(SHAPES.values(), TUNED_TOKENS, dtypes, lambda line: print(line, file=sys.stderr, flush=True))
    print(f"compiled after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    search = tune.search(SHAPES.values(), TUNED_TOKENS, dtypes, target, bench.measure)
    yield from tune_rows(search, keep, lambda: time.monotonic() - began > seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("tune", "products", "norms", "model", "sanitize"))
    parser.add_argument("--variant", choices=MODELS, default=MODELS[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=100, help="when tune begins no further product (default 100)")
    arguments = parser.parse_args()
    torch._dynamo.config.recompile_limit = 10_000
    if arguments.stage == "sanitize":
        sanitize()
        return
    if arguments.stage == "model":
        model = Model(arguments.variant)
        answer_for(model, arguments.layers, sys.stdin, lambda said: print(json.dumps(said), flush=True))
        return
    rows = {
        "tune": lambda: tune_here(arguments.seconds),
        "products": lambda: product_rows(clock_product),
        "norms": lambda: norm_rows(measure_norm),
    }[arguments.stage]()
    for found in rows:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
