"""int8 products on x86 without VNNI, in Markdown: each linear of a Llama against torch's float32 product.

Times faster than float32, for the kernel in vectors of 512 and of 256 bits and for the exact float32 form that runs
anywhere, compiled. Ours with scales, residual and rounding to bf16. Weights are rotated through memory that no cache
holds; all in turns, medians. For what AVX2 gains on a machine that has nothing wider:

    MKL_ENABLE_INSTRUCTIONS=AVX2 make bench-avx
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qcompile.bench.bench import machine
from qcompile.lowering import scaled_mm_int8_float
from qcompile.lowering.scaled_mm_avx import AVX2, AVX512
from qcompile.lowering.target import detect

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure_cpu import MODELS, ROTATED, in_turns, linears

TOKENS = (1, 4, 8, 16, 128)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    here = detect(torch.device("cpu"))
    forms = {form.kernel.called: form.scaled_mm for form in (AVX512, AVX2) if not form.runs_on(here)}
    if not forms:
        sys.exit(f"measure_avx: our kernel {AVX2.runs_on(here)}")
    forms["anywhere"] = torch.compile(scaled_mm_int8_float.scaled_mm, dynamic=False)
    print(", ".join(f"{key} {value}" for key, value in machine().items()), end="\n\n")
    print(f"| K × N | M | float32 µs | {' | '.join(forms)} |\n{'|---' * (3 + len(forms))}|")
    for k, n in linears(MODELS[:1]):
        for tokens in TOKENS:
            float32, *ours = seconds(tokens, k, n, list(forms.values()))
            gains = " | ".join(f"{float32 / found:.2f}×" for found in ours)
            print(f"| {k} × {n} | {tokens} | {float32 * 1e6:.0f} | {gains} |", flush=True)


def seconds(tokens: int, k: int, n: int, products: Sequence[Callable[..., Tensor]]) -> list[float]:
    """Of a float32 product, and of each of these."""
    weights = [torch.randint(-127, 128, (n, k), dtype=torch.int8) for _ in range(max(1, ROTATED // (n * k)))]
    floats = [torch.randn(n, k) for _ in range(max(1, ROTATED // (4 * n * k)))]
    x = torch.randint(-127, 128, (tokens, k), dtype=torch.int8)
    single, scales, weight_scales = x.to(torch.float32), torch.rand(tokens), torch.rand(n)
    residual = torch.randn(tokens, n).to(torch.bfloat16)

    def float32() -> None:
        for weight in floats:
            single @ weight.t()

    def ours(product: Callable[..., Tensor]) -> Callable[[], None]:
        def call() -> None:
            for weight in weights:
                product(x, weight, scales, weight_scales, None, residual, None, torch.bfloat16)

        return call

    torch._dynamo.reset()  # it compiles a function for eight shapes, and runs it uncompiled from then on
    calls = [float32, *map(ours, products)]
    for call in calls:
        call()
    found = in_turns(calls)
    return [found[0] / len(floats), *(one / len(weights) for one in found[1:])]


if __name__ == "__main__":
    main()
