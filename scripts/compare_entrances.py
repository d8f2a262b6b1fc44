"""The same greedy texts through every entrance: generate, pipeline, server, and the compiled float model.

    python scripts/compare_entrances.py MODEL --calibration FILE [--json OUT]

MODEL is a float folder; it is quantized here. What each entrance writes is compared, token by token, with transformers'
own `generate` on the quantized model, op by op. Entrances pad to shapes of their own, and float noise can flip a
rounding to int8; so a text that departs is teacher-forced, and each token's logit is compared with the best one in
its place. The compiled float model is held to itself, op by op and without a cache: it smooths o_proj at run time;
the folder has it folded, with scales that heads share, which is another quantization.
"""

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import torch
from load_server import PROMPTS, server

import qcompile
from qcompile import cli
from qcompile.calibration_sources import calibration_windows
from qcompile.checkpoint.loading import load_float, load_tokenizer
from qcompile.model_limits import positions_of

TOKENS = 48
LENGTH = 128  # positions that are compiled for
Complete = Callable[[list[str]], list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="float model folder")
    parser.add_argument("--calibration", required=True, metavar="FILE")
    parser.add_argument("--json", metavar="OUT", help="write the figures there")
    arguments = parser.parse_args()

    def model_of(inner: str) -> Any:
        return compiled_float(arguments.model, arguments.calibration, inner)

    with tempfile.TemporaryDirectory() as scratch:
        folder = str(Path(scratch) / "quantized")
        words = ["--calibration", arguments.calibration, "--samples", "32", "--seqlen", "256", "--quality", "0"]
        _run("quantize", arguments.model, "--out", folder, *words)
        entrances = {
            "qcompile generate": lambda prompts: through_command(folder, prompts),
            "pipeline, one by one": lambda prompts: through_pipeline(folder, prompts, 1),
            "pipeline, batches of 4": lambda prompts: through_pipeline(folder, prompts, 4),
            "server": lambda prompts: through_server(folder, prompts),
        }
        quantized = qcompile.from_pretrained(folder)
        found = compare(quantized, load_tokenizer(folder), entrances)
        compiled = {"compiled float model": lambda prompts: through_float(folder, model_of("inductor"), prompts)}
        found |= compare(model_of("eager"), load_tokenizer(folder), compiled)
    print(json.dumps(found, indent=2))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def compare(reference: Any, tokenizer: Any, entrances: dict[str, Complete]) -> dict[str, dict[str, Any]]:
    """Per entrance: how many texts are the reference's, and how far the logits of each other one are from the best."""
    expected = [_completion(reference, tokenizer, prompt) for prompt in PROMPTS]
    found = {}
    for name, complete in entrances.items():
        texts = complete(list(PROMPTS))
        others = [
            (prompt, text) for prompt, text, known in zip(PROMPTS, texts, expected, strict=True)
            if not _alike(text, known)
        ]  # fmt: skip
        gaps = [_gap(reference, tokenizer, *other) for other in others]
        found[name] = {"texts": len(texts), "same": len(texts) - len(others), "gaps": [round(gap, 4) for gap in gaps]}
        print(name, found[name], flush=True)
    return found


def _alike(text: str, expected: str) -> bool:
    return text.strip() == expected.strip()


def _completion(model: Any, tokenizer: Any, prompt: str, **settings: Any) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, **settings)[0]
    return _after(tokenizer.decode(ids, skip_special_tokens=True), prompt)


def _after(text: str, prompt: str) -> str:
    return text[text.index(prompt.strip()) + len(prompt.strip()) :]


def _gap(model: Any, tokenizer: Any, prompt: str, text: str) -> float:
    """The largest distance of a written token's logit to the best logit in its place."""
    start = tokenizer(prompt, return_tensors="pt")["input_ids"]
    whole = tokenizer(prompt + text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=whole).logits[0, start.shape[1] - 1 : -1].float()
    chosen = logits.gather(-1, whole[0, start.shape[1] :, None])[:, 0]
    return float((logits.amax(-1) - chosen).max())


def _run(*words: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        if cli.main(words):
            raise SystemExit(f"qcompile {' '.join(words)} failed")
    return printed.getvalue()


def through_command(folder: str, prompts: list[str]) -> list[str]:
    words = ["generate", folder, "--max-new-tokens", str(TOKENS), "--max-length", str(LENGTH), "--prompt"]
    return [_run(*words, prompt).removesuffix("\n") for prompt in prompts]


def through_pipeline(folder: str, prompts: list[str], batch_size: int) -> list[str]:
    pipe = qcompile.pipeline(folder, batch_size=batch_size, max_length=LENGTH)
    made = pipe(prompts, max_new_tokens=TOKENS, do_sample=False, return_full_text=False)
    return [one[0]["generated_text"] for one in made]


def through_server(folder: str, prompts: list[str]) -> list[str]:
    options = argparse.Namespace(model=folder, inner="inductor", max_batch=8, clients=len(prompts))
    with server(options) as (url, _), openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        name = client.models.list().data[0].id

        def ask(prompt: str) -> str:
            done = client.completions.create(model=name, prompt=prompt, max_tokens=TOKENS, temperature=0)
            return done.choices[0].text

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(ask, prompts))


def compiled_float(folder: str, calibration: str, inner: str) -> Any:
    tokenizer, model = load_tokenizer(folder), load_float(folder, dtype="auto", device="cpu", trust_remote_code=False)
    windows = calibration_windows(
        calibration, tokenizer, samples=32, seqlen=256, positions=positions_of(model), vocabulary=None
    ).windows
    ranges = qcompile.calibrate(model, [{"input_ids": ids[None]} for ids in windows])
    model.compile(backend="w8a8", options={"calibration": ranges, "inner": inner})
    return model


def through_float(folder: str, model: Any, prompts: list[str]) -> list[str]:
    tokenizer = load_tokenizer(folder)
    return [_completion(model, tokenizer, prompt, cache_implementation="static") for prompt in prompts]


if __name__ == "__main__":
    main()
