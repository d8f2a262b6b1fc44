"""How large the report of a model of Llama-7B's shape is, and how long Chromium takes to open it.

    python scripts/measure_report.py [--layers 32] [--repeats 5]

Weights are on the meta device. Opened: until the page's own script is done and everything can be used.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import qcompile

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=arguments.layers, **SHAPE)).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        started = time.perf_counter()
        data = qcompile.report(model, path).data
        print(f"made in {time.perf_counter() - started:.1f} s: {path.stat().st_size / 1e6:.1f} MB, "
              f"{len(data['linears'])} linears, {len(data['lines'])} different lines of graphs", flush=True)
        times: dict[str, list[float]] = {}
        for _ in range(arguments.repeats):
            for what, milliseconds in visit(path).items():
                times.setdefault(what, []).append(milliseconds)
    for what, values in times.items():
        print(f"{what}: {statistics.median(values):.0f} ms ({min(values):.0f}-{max(values):.0f})")


def visit(path: Path) -> dict[str, float]:
    """Milliseconds of what a reader does, in a new browser each time."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        executable = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page()
        started = time.perf_counter()
        page.goto(path.as_uri())
        while not page.evaluate("document.documentElement.dataset.ready || ''"):
            time.sleep(0.005)
        found = {"open": (time.perf_counter() - started) * 1e3}
        found["open a diff"] = timed(page, "document.querySelector('details[data-pass=smooth]').open = true")
        found["search"] = timed(page, "search('layers.7.mlp')")
        browser.close()
    return found


def timed(page: Any, code: str) -> float:
    """Milliseconds until the next frame after some JavaScript."""
    wait = "new Promise(done => requestAnimationFrame(() => setTimeout(done)))"
    return float(page.evaluate(f"(async () => {{ const t = performance.now(); {code}; await {wait}; "
                               "return performance.now() - t; })()"))


if __name__ == "__main__":
    main()
