"""One stage of the GPU benchmark, in a process of its own: prints one JSON object per row as soon as it is measured.

A row that fails is a row with an error. `scripts/gpu.py` starts the stages and makes a page of the rows.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

# (N, K) of the products of a layer, siblings merged.
SHAPES = {
    "8B qkv": (6144, 4096), "8B o": (4096, 4096), "8B gate_up": (28672, 4096), "8B down": (4096, 14336),
    "70B qkv": (10240, 8192), "70B o": (8192, 8192), "70B gate_up": (57344, 8192), "70B down": (8192, 28672),
}  # fmt: skip
TOKENS = (1, 16, 32, 128, 512, 2048, 8192)
PRODUCTS = ("triton int8", "triton fp8", "_scaled_mm fp8", "_int_mm + scales", "bf16 matmul")
BY_TMA = ("triton int8 tma", "triton fp8 tma")  # the same tiles; of one model, to save time
TMA_TOKENS = (1, 32, 2048, 8192)
NORMS = ("norm bf16", "norm + quantize int8", "norm + quantize fp8")
MODELS = ("inductor bf16", "w8a8 int8", "w8a8 fp8", "torchao int8", "torchao fp8")
CASES = {"decode, batch 1": (1, 1), "decode, batch 32": (32, 1), "prefill 2048": (1, 2048)}
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


def product_rows(measure: Callable[[str, int, int, int], float]) -> Iterator[Row]:
    """Every shape, number of tokens and form of product; microseconds. measure: variant, M, N, K."""
    for name, (n, k) in SHAPES.items():
        for m in TOKENS:
            both = name.startswith("8B") and m in TMA_TOKENS
            for variant in PRODUCTS + (BY_TMA if both else ()):
                yield row("products", name, m, variant, functools.partial(measure, variant, m, n, k))


def norm_rows(measure: Callable[[str, int, int], float]) -> Iterator[Row]:
    """RMSNorm alone and with the quantize step behind it; microseconds. measure: variant, M, K."""
    for name, width in (("8B", 4096), ("70B", 8192)):
        for m in (1, 32, 1024, 2048, 8192):
            for variant in NORMS:
                yield row("norms", name, m, variant, functools.partial(measure, variant, m, width))


def measure_product(variant: str, m: int, n: int, k: int) -> float:
    from qcompile.bench.gpu_timing import copies, microseconds

    size = n * k * (2 if variant == "bf16 matmul" else 1)
    count = copies(size, torch.cuda.get_device_properties().L2_cache_size)
    make = _product(variant, m, n, k)
    return microseconds([make(seed) for seed in range(count)])


def _product(variant: str, m: int, n: int, k: int) -> Callable[[int], Callable[[], Any]]:
    """A maker of calls: each call has operands of its own."""
    x_scale, weight_scale = torch.full((m,), 1e-2, device="cuda"), torch.full((n,), 1e-2, device="cuda")

    def int8(rows: int, seed: int) -> torch.Tensor:
        random = torch.Generator("cuda").manual_seed(seed)
        return torch.randint(-127, 128, (rows, k), generator=random, device="cuda").to(torch.int8)

    def real(rows: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
        random = torch.Generator("cuda").manual_seed(seed)
        return torch.randn(rows, k, generator=random, device="cuda").to(dtype)

    if variant.startswith("triton"):
        return _ours(variant, m, n, k, int8 if "int8" in variant else functools.partial(real, dtype=_fp8()))
    if variant == "_scaled_mm fp8":

        def rowwise(seed: int) -> Callable[[], Any]:
            x, weight = real(m, seed, _fp8()), real(n, seed + 1, _fp8()).t()
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
        x, weight = real(m, seed, torch.bfloat16), real(n, seed + 1, torch.bfloat16)
        return lambda: torch.nn.functional.linear(x, weight)

    return plain


def _fp8() -> torch.dtype:
    return torch.float8_e4m3fn


def _ours(
    variant: str, m: int, n: int, k: int, operand: Callable[[int, int], torch.Tensor]
) -> Callable[[int], Callable[[], Any]]:
    """The operator as the backend calls it; where K is split, with the kernel that Inductor makes of the sum."""
    from qcompile.commands import tune

    _, dtype, *tma = variant.split()
    tile = _tile(m, n, k, dtype, bool(tma))
    call = torch.compile(tune._call, dynamic=False) if tile.split > 1 else tune._call
    scales = torch.full((m,), 1e-2, device="cuda"), torch.full((n,), 1e-2, device="cuda")

    def ours(seed: int) -> Callable[[], Any]:
        operands = operand(m, seed), operand(n, seed + 1), *scales
        return lambda: call(operands, tile.to_ints())

    return ours


def _tile(m: int, n: int, k: int, dtype: str, tma: bool = False) -> Any:
    """What the backend would take here, or that by TMA."""
    from qcompile.lowering import scaled_mm_kernel  # noqa: F401  (defines the operator)
    from qcompile.lowering.devices import device_of
    from qcompile.lowering.target import detect
    from qcompile.lowering.tiles import choose_tile

    device = device_of(detect(torch.device("cuda", 0)))
    assert device is not None
    if tma and not device.tma:
        raise ValueError("this GPU has no tensor memory access")
    return dataclasses.replace(choose_tile(m, n, k, dtype, device), tma=tma)


@functools.cache
def _scaling() -> Callable[..., Any]:
    def scale(sums: torch.Tensor, x_scale: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
        return (sums.to(torch.float32) * (x_scale[:, None] * weight_scale)).to(torch.bfloat16)

    return torch.compile(scale, dynamic=True)


def _scaled(sums: torch.Tensor, x_scale: torch.Tensor, weight_scale: torch.Tensor) -> Any:
    return _scaling()(sums, x_scale, weight_scale)


def measure_norm(variant: str, m: int, width: int) -> float:
    from qcompile import ops
    from qcompile.bench.gpu_timing import microseconds

    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(variant.rpartition(" ")[2])
    quantize = ops.REFERENCES[ops.quantize]

    def norm(x: torch.Tensor, gain: torch.Tensor) -> Any:
        y = torch.nn.functional.rms_norm(x, (width,), gain, 1e-6)
        return y if dtype is None else quantize(y, [], "row", dtype)

    compiled = torch.compile(norm, dynamic=False)
    x, gain = torch.randn(m, width, device="cuda", dtype=torch.bfloat16), torch.ones(width, device="cuda")
    gain = gain.to(torch.bfloat16)
    return microseconds([lambda: compiled(x, gain)])


def model_rows(variant: str, layers: int, run: Callable[[str, int], float]) -> Iterator[Row]:
    """One variant of a model in every case; milliseconds. run: case, layers."""
    for case in CASES:
        yield row("models", case, layers, variant, functools.partial(run, case, layers))


class Model:
    """A Llama of 8B's shape with random weights on the GPU, made into one variant."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self._model: Any = None

    def run(self, case: str, layers: int) -> float:
        """Median milliseconds of a call."""
        torch._dynamo.reset()
        model = self._build(layers)
        arguments = _arguments(model, *CASES[case])
        forward = self._compiled(model)
        with torch.no_grad():
            started = time.perf_counter()
            for _ in range(3):
                forward(**arguments)
            torch.cuda.synchronize()
            print(f"{self.variant}, {case}: compiled in {time.perf_counter() - started:.0f} s", file=sys.stderr)
            times = []
            for _ in range(20):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                forward(**arguments)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
        return statistics.median(times)

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
    """Every form of the kernel on small odd shapes, for compute-sanitizer to watch."""
    sys.path.insert(0, "tests")
    from kernel_checks import FORMS, check_int8_sums, product

    for tile in FORMS.values():
        for shape in ((1, 1, 1), (17, 33, 65), (33, 130, 31)):
            check_int8_sums(product(*shape, device="cuda"), tile)
    print(json.dumps({"stage": "sanitize", "name": "ran"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("products", "norms", "model", "sanitize"))
    parser.add_argument("--variant", choices=MODELS, default=MODELS[0])
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    torch._dynamo.config.recompile_limit = 10_000
    if arguments.stage == "sanitize":
        sanitize()
        return
    rows = {
        "products": lambda: product_rows(measure_product),
        "norms": lambda: norm_rows(measure_norm),
        "model": lambda: model_rows(arguments.variant, arguments.layers, Model(arguments.variant).run),
    }[arguments.stage]()
    for found in rows:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
