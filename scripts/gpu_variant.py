"""One variant of the GPU benchmark's model, in a process of its own, which answers `gpu_models`: it says on its
standard output that a case is ready, times it as often as its standard input says "time", and goes on at "next"."""

import argparse
import functools
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_models import AT_ONCE, CASES, MODELS, WAITED

from qcompile.model_limits import cache_name

CACHE_LENGTH = 512
CALLS = 10  # of a round
Row = dict[str, Any]
Times = dict[str, list[float]]


def answer_for(
    model: "Model", layers: int, cases: Sequence[str], words: Iterable[str], say: Callable[[Row], None]
) -> None:
    """Say of every case that it is ready, or why it failed, and time it as often as told."""
    said = iter(words)
    for case in cases:
        started = time.perf_counter()
        try:
            run = model.ready(case, layers)
        except Exception as error:
            say({"failed": case, "error": _line(error)})
            continue
        say({"ready": case, "seconds": time.perf_counter() - started})
        while (word := next(said, "end").strip()) == "time":
            try:
                say({"times": run()})
            except Exception as error:  # of the GPU, as a rule, which is lost to this process then
                say({"failed": case, "error": _line(error)})
                return
        if word != "next":
            return
        del run  # and what it holds


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


class Model:
    """A Llama of 8B's shape with random weights on the GPU, made into one variant."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self._model: Any = None

    def ready(self, case: str, layers: int) -> Callable[[], Times]:
        """Compile a case and warm it up. Returns what times it."""
        call = self.prepare(case, layers)
        times(call)
        return functools.partial(times, call)

    def prepare(self, case: str, layers: int) -> Callable[[], object]:
        """A call of a case, which compiles at first."""
        torch._dynamo.reset()
        gc.collect()  # what the case before held
        torch.cuda.empty_cache()
        model = self._build(layers)
        arguments = _arguments(model, *CASES[case])
        forward = self._compiled(model)

        @torch.no_grad()
        def call() -> None:
            forward(**arguments)

        return call

    def _build(self, layers: int) -> Any:
        if self._model is None:
            convert = _torchao(self.variant) if self.variant.startswith("torchao") else None
            self._model = llama(layers, convert)
        return self._model

    def _compiled(self, model: Any) -> Callable[..., Any]:
        if self.variant.startswith("w8a8"):
            options = {"dtype": self.variant.removeprefix("w8a8 "), "mode": "reduce-overhead"}
            return torch.compile(model, backend="w8a8", options=options, dynamic=False)
        return torch.compile(model, mode="reduce-overhead", dynamic=False)


def times(call: Callable[[], object]) -> Times:
    """Milliseconds of a call, in two ways, after some that are not timed."""
    for _ in range(CALLS):  # others were timed meanwhile: clocks and caches come up
        call()
    waited = [_elapsed(call, 1) for _ in range(CALLS)]
    return {AT_ONCE: [_elapsed(call, CALLS) for _ in range(2)], WAITED: waited}


def _elapsed(call: Callable[[], object], calls: int) -> float:
    """Milliseconds of one of so many calls that follow each other; the GPU is idle before the first."""
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / calls


def llama(layers: int, convert: Callable[[Any], None] | None, device: str = "cuda", **sizes: int) -> Any:
    """A Llama of 8B's shape (other sizes are for tests) in bf16 with random weights, each layer converted as soon as it
    is made, so that the GPU never holds more than one that is not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(**shape | sizes, num_hidden_layers=1)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).requires_grad_(False)
        stack = model.model.layers
        for index in range(layers):
            layer = type(stack[0])(config, index) if index else stack[0]
            layer.requires_grad_(False).to(torch.bfloat16)
            for weight in layer.parameters():
                if weight.ndim > 1:
                    weight.normal_(std=config.initializer_range)
            if convert is not None:
                convert(layer)
            if index:
                stack.append(layer)
    config.num_hidden_layers = layers
    return model.eval()


def _torchao(variant: str) -> Callable[[Any], None]:
    try:
        from torchao import quantization
    except ImportError:
        raise RuntimeError("torchao is not installed here") from None
    config = (
        quantization.Int8DynamicActivationInt8WeightConfig()
        if variant == "torchao int8"
        else quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    )
    return lambda layer: quantization.quantize_(layer, config)


def _arguments(model: Any, batch: int, tokens: int) -> dict[str, Any]:
    ids = torch.arange(batch * tokens, device="cuda").reshape(batch, tokens) % 1000
    if tokens > 1:
        return {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
    name, cache = cache_name(model.forward), static_cache(model)
    with torch.no_grad():
        model(input_ids=ids.repeat(1, 8), **{name: cache})
    position = torch.full((batch, 1), CACHE_LENGTH // 2, device="cuda")
    return {"input_ids": ids, name: cache, "position_ids": position, "use_cache": True}


def static_cache(model: Any) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=MODELS)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    arguments = parser.parse_args()
    torch._dynamo.config.recompile_limit = 10_000
    model = Model(arguments.variant)
    answer_for(
        model, arguments.layers, arguments.cases, sys.stdin, lambda said: print(json.dumps(said), flush=True)
    )


if __name__ == "__main__":
    main()
