"""`qcompile demo`: the main job on the model that ships with the package, measured in front of the user."""

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
from qcompile.evaluation import Score, score, token_windows
from qcompile.outliers import inject_outliers
from qcompile.recording import calibrate
from qcompile.stdlib_text import stdlib_text

MODEL = Path(__file__).parent / "demo_model"
WINDOW, BATCH = 256, 8
PROMPT = "def read_lines(path):\n"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a variant, its score, and how long it took to compile (None: not compiled)."""

    variant: str
    score: Score
    compile_seconds: float | None


def run(
    *, windows: int = 32, dump: str = "qcompile_debug/demo", console: Console | None = None
) -> dict[str, list[Row]]:
    """Run the demo and print its table. Returns the rows, keyed "as trained" and "outliers injected"."""
    console = console or Console()
    model, tokenizer = load()
    held_out = token_windows(tokenizer, stdlib_text("held_out"), WINDOW, limit=windows)
    data = torch.split(token_windows(tokenizer, stdlib_text("calibration"), WINDOW, limit=32), BATCH)
    inner = "inductor" if has_compiler() else "eager"
    if inner == "eager":
        console.print('No C++ compiler found: Inductor is left out, w8a8 runs with inner="eager" (slow, same numbers).')
    rows: dict[str, list[Row]] = {}
    with _progress(console) as progress:
        measure = _Measure(progress, held_out, inner)
        calibration = measure.calibrate(model, data)
        plain = [measure.float_eager(model)]
        if inner == "inductor":
            plain.append(measure.float_inductor(model))
        plain.append(measure.w8a8(model, None, "W8A8, no smoothing"))
        plain.append(measure.w8a8(model, calibration, "W8A8, smoothed", dump))
        sample = measure.generate(model, tokenizer, calibration)
        norms = inject_outliers(model)
        calibration = measure.calibrate(model, data)
        injected = [measure.float_eager(model)]
        injected.append(measure.w8a8(model, None, "W8A8, no smoothing"))
        injected.append(measure.w8a8(model, calibration, "W8A8, smoothed"))
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


def has_compiler() -> bool:
    """Whether Inductor finds a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return bool(get_cpp_compiler())
    except Exception:  # Inductor's own error type differs between versions
        return False


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

    def float_eager(self, model: Any) -> Row:
        return self._row("float32, eager", model, compiled=False)

    def float_inductor(self, model: Any) -> Row:
        return self._row("float32, Inductor", torch.compile(model, dynamic=False), compiled=True)

    def w8a8(self, model: Any, calibration: Calibration | None, variant: str, dump: str | None = None) -> Row:
        options: dict[str, Any] = {"inner": self.inner, "dump": dump}
        if calibration is not None:
            options |= {"calibration": calibration, "alpha": 0.5}
        # One shape is scored; without dynamic=False, Dynamo would generalise from the shapes of earlier calls.
        compiled = torch.compile(model, backend="w8a8", options=options, dynamic=False)
        return self._row(variant, compiled, compiled=True)

    def _row(self, variant: str, forward: Any, *, compiled: bool) -> Row:
        task = self.progress.add_task(variant, total=len(self.windows) // BATCH + 1)
        started = time.perf_counter()
        with torch.no_grad():
            forward(input_ids=self.windows[:BATCH], use_cache=False)
        seconds = time.perf_counter() - started
        self.progress.advance(task)
        result = score(forward, self.windows, BATCH, lambda: self.progress.advance(task))
        return Row(variant, result, seconds if compiled else None)

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
        f"\nHeld-out text of the Python standard library: {tokens} tokens in windows of {WINDOW}, batch {BATCH}.\n"
        f"Outliers injected: 2 channels of each of the {norms} norms times 64, divided out again in the linears;\n"
        "the float model computes the same, its activations are as uneven as a large model's.\n"
    )
    table = Table()
    for heading in ("", "perplexity", "Δ NLL", "tokens/s", "vs eager", "first call, s"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for title, group in rows.items():
        table.add_row(f"[bold]{title}[/bold]")
        for row in group:
            table.add_row(*_cells(row, group[0]))
        table.add_section()
    console.print(table)
    console.print("[bold]Sample[/bold], greedy, from the smoothed W8A8 model with prefill and decode compiled:")
    console.print(sample, markup=False, highlight=False)
    console.print(f"Graphs before and after every pass: {Path(dump).resolve()}", soft_wrap=True)


def _cells(row: Row, base: Row) -> list[str]:
    speed = row.score.tokens_per_second
    return [
        f"  {row.variant}",
        f"{row.score.perplexity:.3f}",
        f"{row.score.nll - base.score.nll:+.4f}",
        f"{speed:,.0f}",
        f"{speed / base.score.tokens_per_second:.2f}×",
        "" if row.compile_seconds is None else f"{row.compile_seconds:.1f}",
    ]
