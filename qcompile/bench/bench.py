"""`qcompile bench`: float and quantized variants of one model, each in a process of its own, timed in turns.

A worker process builds the model, compiles it for every case and then waits. The parent lets one worker after the other
run a case, round by round, so that a machine that slows down slows all of them, and quotes medians.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from qcompile.checkpoint.loading import load_float
from qcompile.errors import ConfigError
from qcompile.model_limits import CACHE_NAMES, cache_name
from qcompile.paths import expanded

TURN = 0.05  # seconds of calls that one figure is the mean of
CACHE_LENGTH = 256  # of the static KV cache a decode step reads
SHAPES = {
    # hidden, intermediate, layers, heads, KV heads, vocabulary
    "llama-100m": (1024, 2816, 8, 16, 16, 4096),
    "llama-400m": (2048, 5632, 8, 16, 16, 4096),
    "llama-1b": (2048, 8192, 16, 32, 8, 32000),
}
MIXTURES = {  # the same, of Qwen3-MoE, then experts, and how many of them a token meets
    "moe-330m": (1024, 512, 6, 16, 4, 8192, 32, 4),
}
CASES = {
    "decode, batch 1": (1, 1), "decode, batch 8": (8, 1),
    "prefill 128": (1, 128), "prefill 512": (1, 512), "prefill 2048": (1, 2048),
}  # fmt: skip
VARIANTS = ("eager bf16", "inductor fp32", "inductor bf16", "torchao int8", "w8a8 int8")


@dataclasses.dataclass(frozen=True)
class Timing:
    """One variant's figures: seconds of every round per case; of the first call per case in a process with empty
    caches (cold) and in the next process (warm); and the latter's peak resident memory in bytes."""

    variant: str
    seconds: dict[str, list[float]]
    cold: dict[str, float]
    warm: dict[str, float]
    peak_memory: int

    def median(self, case: str) -> float:
        return statistics.median(self.seconds[case])


def bench(
    model: str,
    *,
    variants: Sequence[str] = VARIANTS,
    cases: Sequence[str] = tuple(CASES),
    rounds: int = 15,
    threads: int = 0,
    told: Callable[[str], None] = lambda line: None,
) -> list[Timing]:
    """Time variants of a model in turns.

    model: the name of one of SHAPES or MIXTURES (random weights), or a model's folder. threads: of each worker; 0
    leaves torch's default. told: called with a line whenever something long begins. Raises ConfigError.
    """
    for what, names, known in (("variant", variants, VARIANTS), ("case", cases, tuple(CASES))):
        for name in names:
            if name not in known:
                raise ConfigError(f"{what} must be one of {', '.join(known)}; got {name!r}")
    named = SHAPES | MIXTURES
    if model not in named and not expanded(model).is_dir():
        raise ConfigError(f"model must be one of {', '.join(named)}, or a model's folder; got {model!r}")
    with contextlib.ExitStack() as stack:
        caches = stack.enter_context(tempfile.TemporaryDirectory(prefix="qcompile-bench-"))
        workers, cold, warm = [], [], []
        for number, variant in enumerate(variants):
            description = model, variant, threads, f"{caches}/{number}"
            with contextlib.closing(_Worker(*description)) as first:
                cold.append(_compile(first, cases, "cold", told))
            workers.append(stack.enter_context(contextlib.closing(_Worker(*description))))
            warm.append(_compile(workers[-1], cases, "warm", told))
        seconds: list[dict[str, list[float]]] = [{case: [] for case in cases} for _ in variants]
        for case in cases:
            told(f"timing {case}")
            for _ in range(rounds):
                for worker, measured in zip(workers, seconds, strict=True):
                    measured[case].append(worker.ask(("run", case)))
        peaks = [int(worker.ask(("memory", ""))) for worker in workers]
        return [Timing(*figures) for figures in zip(variants, seconds, cold, warm, peaks, strict=True)]


def _compile(worker: "_Worker", cases: Sequence[str], state: str, told: Callable[[str], None]) -> dict[str, float]:
    """Seconds of the first call of every case."""
    first = {}
    for case in cases:
        told(f"{worker.variant}: compiling for {case}, {state}")
        first[case] = worker.ask(("compile", case))
    return first


class _Worker:
    """The parent's end of one variant's process."""

    def __init__(self, model: str, variant: str, threads: int, cache: str) -> None:
        self.variant = variant
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_work, args=(child, model, variant, threads, cache), daemon=True)
        self._process.start()
        child.close()

    def ask(self, request: tuple[str, str]) -> float:
        """Raises ConfigError if the process has ended."""
        try:
            self._connection.send(request)
            answer: float | str = self._connection.recv()
        except (EOFError, ConnectionError):
            raise ConfigError(f"variant {self.variant} ended before its time; its own message is above") from None
        if isinstance(answer, str):
            raise ConfigError(f"variant {self.variant} cannot run here: {answer}")
        return answer

    def close(self) -> None:
        self._process.terminate()
        self._process.join()


def _work(connection: Connection, model: str, variant: str, threads: int, cache: str) -> None:
    """A worker's life: answer requests with seconds (or bytes, or a sentence) until terminated."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    if threads:
        torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = 64
    runner: _Runner | None = None
    while True:
        what, case = connection.recv()
        try:
            runner = runner or _Runner(model, variant)
            connection.send(runner.answer(what, case))
        except Exception as error:  # the parent reports it
            connection.send(f"{type(error).__name__}: {error}".partition("\n")[0])


class _Runner:
    def __init__(self, model: str, variant: str) -> None:
        self.model = _build(model, torch.float32 if variant.endswith("fp32") else torch.bfloat16)
        self._forward = _forward(self.model, variant)
        self._calls: dict[str, dict[str, Any]] = {}

    def answer(self, what: str, case: str) -> float:
        if what == "memory":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        if what == "compile":
            self._calls[case] = _arguments(self.model, *CASES[case])
            started = time.perf_counter()
            self._call(case)
            first = time.perf_counter() - started
            self._call(case)
            return first
        self._call(case)  # the others have had the machine since
        started = time.perf_counter()
        calls = 0
        while not calls or time.perf_counter() - started < TURN:
            self._call(case)
            calls += 1
        return (time.perf_counter() - started) / calls

    def _call(self, case: str) -> None:
        _rewind(self._calls[case])
        with torch.no_grad():
            self._forward(**self._calls[case])


def _build(model: str, dtype: torch.dtype) -> Any:
    import transformers

    if model not in SHAPES | MIXTURES:
        return load_float(model, dtype=dtype)
    hidden, intermediate, layers, heads, kv_heads, vocabulary, *experts = (SHAPES | MIXTURES)[model]
    torch.manual_seed(0)
    sizes = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
    }  # fmt: skip
    if experts:
        count, met = experts
        sizes |= {"num_experts": count, "num_experts_per_tok": met, "moe_intermediate_size": intermediate}
        kind, config = transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(**sizes)
    else:
        kind, config = transformers.LlamaForCausalLM, transformers.LlamaConfig(**sizes)
    return kind._from_config(config, dtype=dtype).eval().requires_grad_(False)


def _forward(model: Any, variant: str) -> Callable[..., Any]:
    if variant.startswith("eager"):
        forward: Callable[..., Any] = model
        return forward
    if variant.startswith("torchao"):
        try:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
        except ImportError:
            raise ConfigError("it needs torchao; install qcompile[bench], or leave the variant out") from None
        quantize_(
            model,
            Int8DynamicActivationInt8WeightConfig(),
            lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head",
        )
    if variant.startswith("w8a8"):
        return torch.compile(model, backend="w8a8", dynamic=False)
    return torch.compile(model, dynamic=False)


def _arguments(model: Any, batch: int, tokens: int) -> dict[str, Any]:
    from transformers import StaticCache

    ids = torch.arange(batch * tokens).reshape(batch, tokens) % model.config.vocab_size
    if tokens > 1:
        return {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
    name, cache = cache_name(model.forward), StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
    with torch.no_grad():
        model(input_ids=ids.repeat(1, 8), **{name: cache})
    position = torch.full((batch, 1), CACHE_LENGTH // 2)
    return {"input_ids": ids, name: cache, "position_ids": position, "use_cache": True}


def _rewind(arguments: dict[str, Any]) -> None:
    """Every decode step is to write the same row: a static cache counts its tokens, and has an end."""
    cache = next((arguments[name] for name in CACHE_NAMES if name in arguments), None)
    for layer in cache.layers if cache is not None else ():
        if isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
            layer.cumulative_length.fill_(CACHE_LENGTH // 2)


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    names = (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name"))
    return {
        "cpu": next(names, platform.machine()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpuinfo() -> Iterator[str]:
    path = Path("/proc/cpuinfo")
    yield from path.read_text().splitlines() if path.exists() else ()


def table(timings: Sequence[Timing], ours: str = "w8a8 int8") -> str:
    """A Markdown table: milliseconds (median, spread between quartiles) per case, and our ratio to each variant."""
    cases = list(timings[0].seconds)
    lines = ["| case | " + " | ".join(t.variant for t in timings) + " |", "|---" * (len(timings) + 1) + "|"]
    mine = next((t for t in timings if t.variant == ours), None)
    for case in cases:
        cells = []
        for timing in timings:
            low, _, high = statistics.quantiles(timing.seconds[case], n=4)
            ratio = f", {timing.median(case) / mine.median(case):.2f}×" if mine and timing is not mine else ""
            cells.append(f"{timing.median(case) * 1e3:.2f} ms ({low * 1e3:.2f}–{high * 1e3:.2f}){ratio}")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    for label, first in (("cold", [t.cold for t in timings]), ("warm", [t.warm for t in timings])):
        cells = [f"{sum(calls.values()):.1f} s" for calls in first]
        lines.append(f"| first calls, {label} | " + " | ".join(cells) + " |")
    lines.append("| peak memory | " + " | ".join(f"{t.peak_memory / 2**20:.0f} MiB" for t in timings) + " |")
    return "\n".join(lines)


def to_json(timings: Sequence[Timing]) -> str:
    return json.dumps({"machine": machine(), "timings": [dataclasses.asdict(t) for t in timings]}, indent=2)
