"""Many streaming clients against `qcompile serve`: tokens per second, latencies, memory, whether texts are right.

    python scripts/load_server.py DIR [--clients 64] [--seconds 60] [--max-batch 16] [--json OUT]

Starts the server itself, with one client, then with all of them. Texts are greedy and compared with the quantized
model's own generate; where one departs, the two best logits must be within 0.1 there: shapes differ, and float noise
can flip a rounding to int8.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import torch

import qcompile
from qcompile.checkpoint.loading import load_tokenizer

PROMPTS = (
    "Once upon a time", "One day, a girl named Lily", "Tom had a red ball.", "The dog", "In the park, two friends",
    "Mom said", "There was a big tree", "A little bird", "It was a sunny day", "Ben and Mia", "The cat sat",
    "She was very happy because", "He wanted to", "They went to the", "The moon", "Sam saw a",
)  # fmt: skip
TOKENS = 48
STOPPED_AFTER = 5.0  # seconds
CLOSE = 0.1  # largest distance of the two best logits at which a text may depart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", metavar="DIR", help="quantized model folder")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--json", metavar="OUT", help="write the figures there")
    arguments = parser.parse_args()
    references = dict(zip(PROMPTS, make_references(arguments.model), strict=True))
    with server(arguments) as (url, process):
        alone = asyncio.run(load(url, 1, arguments.seconds / 3))
        before = resident(process.pid)
        together = asyncio.run(load(url, arguments.clients, arguments.seconds))
        after = resident(process.pid)
        stopped = asyncio.run(stop_under_load(url, arguments.clients, process))
    found = {
        "one client": figures(alone, references),
        f"{arguments.clients} clients": figures(together, references),
        "resident MiB before and after": [round(before), round(after)],
        "SIGTERM under load": stopped_figures(stopped, references) | {"exit status": process.returncode},
    }
    print(json.dumps(found, indent=2))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def make_references(folder: str) -> Iterator[tuple[list[str], list[float]]]:
    """For each prompt: the text after 0, 1, 2, … tokens, and how far apart the two best logits were at each."""
    model, tokenizer = qcompile.from_pretrained(folder), load_tokenizer(folder)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            made = model.generate(
                **inputs, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        start = inputs["input_ids"].shape[1]
        whole = made.sequences[0].tolist()
        texts = [tokenizer.decode(whole[: start + i], skip_special_tokens=True) for i in range(len(whole) - start + 1)]
        best = [logits[0].topk(2).values for logits in made.logits]
        yield [text.removeprefix(texts[0]) for text in texts], [float(two[0] - two[1]) for two in best]


@contextmanager
def server(arguments: argparse.Namespace) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    command = [
        sys.executable, "-P", "-m", "qcompile", "serve", arguments.model, "--port", "0", "--inner", arguments.inner,
        "--max-batch", str(arguments.max_batch), "--max-queue", str(arguments.clients), "--max-length", "128",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if match := re.search(r"on (http://\S+)", line):
                yield match[1], process
                return
        raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.wait(60)


async def load(url: str, clients: int, seconds: float) -> dict[str, Any]:
    """Clients that ask one thing after the other until the time is over; what they got."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
        return await ask_for(client, clients, seconds)


async def ask_for(client: openai.AsyncOpenAI, clients: int, seconds: float) -> dict[str, Any]:
    name = (await client.models.list()).data[0].id
    started = time.perf_counter()
    answers: list[tuple[str, str]] = []
    firsts: list[float] = []
    failures: list[str] = []
    tokens = [0]

    async def ask(prompt: str) -> None:
        asked, text, seen = time.perf_counter(), "", False
        stream = await client.completions.create(
            model=name, prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        finished = False
        async for event in stream:
            if event.usage:
                tokens[0] += event.usage.completion_tokens
            for choice in event.choices:
                if not seen:
                    firsts.append(time.perf_counter() - asked)
                    seen = True
                text += choice.text
                finished = finished or choice.finish_reason is not None
        if not finished:
            failures.append("a stream ended early")
        answers.append((prompt, text))

    async def keep_asking(index: int) -> None:
        while time.perf_counter() - started < seconds:
            try:
                await ask(PROMPTS[index % len(PROMPTS)])
            except openai.OpenAIError as error:
                failures.append(type(error).__name__)
                if isinstance(error, openai.APIConnectionError):
                    return  # nobody is there any more
            index += 7

    await asyncio.gather(*(keep_asking(index) for index in range(clients)))
    took = time.perf_counter() - started
    return {"answers": answers, "firsts": firsts, "failures": failures, "tokens": tokens[0], "seconds": took}


async def stop_under_load(url: str, clients: int, process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Clients ask, the server is told to stop, the clients go on asking: what they got, and how long it took to end."""

    async def stop() -> float:
        await asyncio.sleep(STOPPED_AFTER)
        process.terminate()
        told = time.perf_counter()
        await asyncio.to_thread(process.wait, 120)
        return time.perf_counter() - told

    found, took = await asyncio.gather(load(url, clients, STOPPED_AFTER + 1), stop())
    return found | {"took": took}


def stopped_figures(found: dict[str, Any], references: dict[str, tuple[list[str], list[float]]]) -> dict[str, Any]:
    """Streams that had begun must end whole; who asks later finds no server."""
    whole = figures(found, references)
    kept = {name: whole[name] for name in ("streams", "same text", "departs at close logits", "wrong")}
    kinds = {kind: found["failures"].count(kind) for kind in sorted(set(found["failures"]))}
    return kept | {"refused or failed": kinds, "seconds until it ended": round(found["took"], 1)}


def figures(found: dict[str, Any], references: dict[str, tuple[list[str], list[float]]]) -> dict[str, Any]:
    departures = [departure(text, *references[prompt]) for prompt, text in found["answers"]]
    quantiles = statistics.quantiles(found["firsts"], n=20) if len(found["firsts"]) > 1 else [float("nan")] * 19
    return {
        "streams": len(departures),
        "failed": len(found["failures"]),
        "same text": departures.count(None),
        "departs at close logits": sum(gap is not None and gap <= CLOSE for gap in departures),
        "wrong": sum(gap is not None and gap > CLOSE for gap in departures),
        "tokens/s": round(found["tokens"] / found["seconds"], 1),
        "first token, median s": round(quantiles[9], 3),
        "first token, 95% s": round(quantiles[18], 3),
    }


def departure(text: str, texts: list[str], gaps: list[float]) -> float | None:
    """How far apart the two best logits were where a text departs from the reference; None if it does not."""
    if text == texts[-1]:
        return None
    same = max(i for i, prefix in enumerate(texts) if text.startswith(prefix))
    return gaps[same] if same < len(gaps) else float("inf")


def resident(pid: int) -> float:
    """MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


if __name__ == "__main__":
    main()
