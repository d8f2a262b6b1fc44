"""Two ways for sequences to share decode steps, in process: slots of a static cache, and transformers' own batching.

    python scripts/measure_batching.py DIR [--streams 16] [--rounds 7] [--json OUT]

Both run the same quantized model, compiled by the w8a8 backend, greedily; slots take as many prompts as there are
streams. Rounds alternate; medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from load_server import PROMPTS, TOKENS
from transformers import ContinuousBatchingConfig, GenerationConfig

import qcompile
from qcompile.checkpoint.loading import load_tokenizer
from qcompile.generation.compiled_model import compiling
from qcompile.generation.slots import Slots

LENGTH = 128
Generate = Callable[[], int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", metavar="DIR", help="quantized model folder")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="OUT", help="write the figures there")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    prompts = [tokenizer(PROMPTS[i % len(PROMPTS)])["input_ids"] for i in range(arguments.streams)]
    ways = {
        "slots, all": with_slots(qcompile.from_pretrained(arguments.model), prompts),
        "slots, one": with_slots(qcompile.from_pretrained(arguments.model), prompts[:1]),
        "transformers, all": with_manager(qcompile.from_pretrained(arguments.model), prompts),
        "transformers, one": with_manager(qcompile.from_pretrained(arguments.model), prompts[:1]),
    }
    for generate in ways.values():
        generate()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, generate in ways.items():
            started = time.perf_counter()
            made = generate()
            rates[name].append(made / (time.perf_counter() - started))
    found = {f"{name}, tokens/s": round(statistics.median(values)) for name, values in rates.items()}
    print(json.dumps(found, indent=2))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def with_slots(model: Any, prompts: list[list[int]]) -> Generate:
    slots = Slots(model, len(prompts), LENGTH, "inductor")
    slots.warm_up()

    def generate() -> int:
        last = [int(slots.prefill(slot, prompt).argmax()) for slot, prompt in enumerate(prompts)]
        for step in range(TOKENS - 1):
            positions = [len(prompt) + step for prompt in prompts]
            last = slots.decode(last, positions).argmax(-1).tolist()
        return TOKENS * len(prompts)

    return generate


def with_manager(model: Any, prompts: list[list[int]]) -> Generate:
    model.set_attn_implementation("sdpa")
    model.compile(backend="w8a8")
    settings = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1)
    batching = ContinuousBatchingConfig(
        num_blocks=64, max_batch_tokens=256, q_padding_interval_size=16, kv_padding_interval_size=256
    )

    def generate() -> int:
        with torch.no_grad(), compiling():
            made = model.generate_batch(
                prompts, generation_config=settings, continuous_batching_config=batching, persistent_manager=True
            )
        assert len(made) == len(prompts)
        return sum(len(one.generated_tokens) for one in made.values())

    return generate


if __name__ == "__main__":
    main()
