"""Small linears: Inductor's time of a call by w8a8's, per width, number of tokens and dtype, in Markdown.

    python scripts/measure_small.py

The model is eight blocks x + W2·silu(W1·norm(x)) of one width. Calls in turns; medians.
"""

import itertools
import statistics
import time

import torch
from torch import Tensor, nn

WIDTHS = (32, 64, 128, 256, 512)
TOKENS = (1, 8, 128)
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS, CALLS = 31, 30


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.inner, self.outer = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.outer(nn.functional.silu(self.inner(self.norm(x))))
        return y


def main() -> None:
    columns = list(itertools.product(DTYPES, TOKENS))
    print("| width | " + " | ".join(f"{str(dtype).removeprefix('torch.')}, {m}" for dtype, m in columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for width in WIDTHS:
        print(f"| {width} | " + " | ".join(_ratio(width, dtype, m) for dtype, m in columns) + " |", flush=True)


@torch.no_grad()
def _ratio(width: int, dtype: torch.dtype, tokens: int) -> str:
    torch._dynamo.reset()
    model = nn.Sequential(*[Block(width) for _ in range(8)]).to(dtype).eval()
    calls = [torch.compile(model, dynamic=False), torch.compile(model, backend="w8a8", dynamic=False)]
    x = torch.randn(tokens, width, dtype=dtype)
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for call, measured in zip(calls, times, strict=True):
            call(x)
            started = time.perf_counter()
            for _ in range(CALLS):
                call(x)
            measured.append((time.perf_counter() - started) / CALLS * 1e6)
    floating, ours = map(statistics.median, times)
    return f"{floating:.0f} : {ours:.0f} µs, {floating / ours:.2f}×"


if __name__ == "__main__":
    main()
