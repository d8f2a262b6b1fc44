"""The main job on the model that ships with the package, measured in front of the user."""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from qcompile.calibration import Calibration
from qcompile.dump import check_folder
from qcompile.lowering.inductor import choose_inner
from qcompile.outliers import inject_outliers
from qcompile.paths import expanded
from qcompile.quality.likelihood import Score, race, score, token_windows
from qcompile.recording import calibrate
from qcompile.stdlib_text import stdlib_text

MODEL = Path(__file__).parent / "demo_model"
WINDOW, BATCH, ROUNDS = 256, 8, 5
PROMPT = "def read_lines(path):\n"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a variant, its score, the seconds its first call took (None: nothing to compile), and
    tokens per second (None: not raced)."""

    variant: str
    score: Score
    first_call: float | None
    tokens_per_second: float | None = None


def run(
    *, windows: int = 32, dump: str = "qcompile_debug/demo", console: Console | None = None
) -> dict[str, list[Row]]:
    """Run the demo and print its table. Returns the rows, keyed "as trained" and "outliers injected"."""
    console = console or Console()
    check_folder(expanded(dump))
    model, tokenizer = load()
    held_out = token_windows(tokenizer, stdlib_text("held_out"), WINDOW, limit=windows)
    data = torch.split(token_windows(tokenizer, stdlib_text("calibration"), WINDOW, limit=32), BATCH)
    inner = choose_inner("auto")
    if inner == "eager":
        console.print('No C++ compiler found: Inductor is left out, w8a8 runs with inner="eager" (slow, same numbers).')
    with _progress(console) as progress:
        measure = _Measure(progress, held_out, inner)
        calibration = measure.calibrate(model, data)
        forwards = {"float32, eager": model, **measure.compiled(model, calibration, dump)}
        plain = measure.speeds(forwards, [measure.row(variant, forward) for variant, forward in forwards.items()])
        sample = measure.generate(model, tokenizer, calibration)
        norms = inject_outliers(model)
        calibration = measure.calibrate(model, data)
        forwards = {"float32, eager": model, **measure.compiled(model, calibration, None)}
        forwards.pop("float32, Inductor", None)
        injected = [measure.row(variant, forward) for variant, forward in forwards.items()]
    rows = {"as trained": plain, "outliers injected": injected}
    _print(console, rows, norms, held_out.numel(), sample, dump)
    return rows


def load() -> tuple[Any, Any]:
    """The demo model in float32 and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return model.requires_grad_(False), AutoTokenizer.from_pretrained(MODEL)


class _Measure:
    """Runs one variant after the other, showing each as a progress bar."""

    def __init__(self, progress: Progress, windows: torch.Tensor, inner: str) -> None:
        self.progress, self.windows, self.inner = progress, windows, inner

    def calibrate(self, model: Any, data: Any) -> Calibration:
        task = self.progress.add_task("calibrating", total=len(data))

        def shown() -> Iterator[torch.Tensor]:
            for batch in data:
                yield batch
                self.progress.advance(task)

        return calibrate(model, shown())

    def compiled(self, model: Any, calibration: Calibration, dump: str | None) -> dict[str, Any]:
        """The compiled variants; each compiles at its first call."""
        variants: dict[str, Any] = {}
        # One shape is scored; without dynamic=False, Dynamo would generalise from the shapes of earlier calls.
        if self.inner == "inductor":
            variants["float32, Inductor"] = torch.compile(model, dynamic=False)
        options: dict[str, Any] = {"inner": self.inner}
        variants["W8A8, no smoothing"] = torch.compile(model, backend="w8a8", options=options, dynamic=False)
        options = {**options, "calibration": calibration, "alpha": 0.5, "dump": dump}
        variants["W8A8, smoothed"] = torch.compile(model, backend="w8a8", options=options, dynamic=False)
        return variants

    def row(self, variant: str, forward: Any) -> Row:
        """Compile and score one variant."""
        task = self.progress.add_task(variant, total=len(self.windows) // BATCH + 1)
        started = time.perf_counter()
        with torch.no_grad():
            forward(input_ids=self.windows[:BATCH], use_cache=False)
        first_call = time.perf_counter() - started
        self.progress.advance(task)
        result = score(forward, self.windows, BATCH, lambda: self.progress.advance(task))
        return Row(variant, result, None if variant == "float32, eager" else first_call)

    def speeds(self, forwards: dict[str, Any], rows: list[Row]) -> list[Row]:
        """The rows with speeds, measured in turns."""
        task = self.progress.add_task("measuring speed", total=ROUNDS)
        speeds = race(forwards, self.windows[:BATCH], ROUNDS, lambda: self.progress.advance(task))
        return [dataclasses.replace(row, tokens_per_second=speeds[row.variant]) for row in rows]

    def generate(self, model: Any, tokenizer: Any, calibration: Calibration) -> str:
        """Greedy text from the quantized model, prefill and decode both compiled."""
        task = self.progress.add_task("generating a sample", total=1)
        prompt = tokenizer(PROMPT, return_tensors="pt")
        options = {"inner": "eager", "calibration": calibration}
        model.compile(backend="w8a8", options=options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids = model.generate(**prompt, max_new_tokens=48, do_sample=False, cache_implementation="static")
        model._compiled_call_impl = None
        self.progress.advance(task)
        return str(tokenizer.decode(ids[0], skip_special_tokens=True))


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description:24s}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield progress


def _print(console: Console, rows: dict[str, list[Row]], norms: int, tokens: int, sample: str, dump: str) -> None:
    console.print(
        f"\nHeld-out text of the Python standard library: {tokens} tokens, in batches of\n"
        f"{BATCH} windows of {WINDOW}. Speeds are medians of {ROUNDS} rounds taken in turns.\n"
        f"Outliers are injected into {norms} norms, 2 channels each: times 64, and divided\n"
        "out again in the linears, so the float model still computes the same.\n"
    )
    table = Table()
    for heading in ("", "perplexity", "Δ NLL", "tokens/s", "speed", "1st call"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for title, group in rows.items():
        table.add_row(f"[bold]{title}[/bold]")
        for row in group:
            table.add_row(*_cells(row, group[0]))
        table.add_section()
    console.print(table)
    console.print("[bold]Sample[/bold], greedy, from the smoothed W8A8 model with prefill and decode compiled:")
    console.print(sample, markup=False, highlight=False)
    console.print(f"Graphs before and after every pass: {expanded(dump).resolve()}", soft_wrap=True)


def _cells(row: Row, base: Row) -> list[str]:
    speed, first = row.tokens_per_second, row.first_call
    return [
        f" {row.variant}",
        f"{row.score.perplexity:.3f}",
        f"{row.score.nll - base.score.nll:+.4f}" if row is not base else "",
        f"{speed:,.0f}" if speed is not None else "",
        f"{speed / base.tokens_per_second:.2f}×" if speed is not None and base.tokens_per_second else "",
        f"{first:.1f} s" if first is not None else "",
    ]
