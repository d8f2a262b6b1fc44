"""`qcompile bisect MODEL --text FILE`: which pass, then which linears, cost the accuracy."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from qcompile.commands.arguments import add_scheme, add_shared, check_text, scheme_of, whole
from qcompile.errors import ConfigError

WINDOWS, TOKENS = 4, 256


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser."""
    parser = commands.add_parser("bisect", help="which pass, then which linears, cost the accuracy")
    parser.add_argument("model", metavar="MODEL", help="float model folder, or with --against a quantized one")
    parser.add_argument("--text", metavar="FILE", help="text to compare on (default: built-in)")
    parser.add_argument("--against", metavar="FLOAT", help="the float model that a quantized MODEL was made from")
    parser.add_argument(
        "--threshold", type=float, default=0.01, metavar="KL",
        help="KL(float ‖ quantized) in nats per token above which accuracy is lost (default 0.01)",
    )  # fmt: skip
    parser.add_argument("--passes", help="the passes to search, as a pipeline (default: those of the backend)")
    add_scheme(parser, "--dtype", "--activations", "--clip", "--alpha", "--ignore")
    parser.add_argument("--calibration", metavar="SOURCE", help="as for quantize, or a saved .safetensors calibration")
    parser.add_argument("--samples", type=whole(1), default=16, help="calibration windows (default 16)")
    parser.add_argument("--windows", type=whole(1), default=WINDOWS, help="windows to compare on (default %(default)s)")
    parser.add_argument("--seqlen", type=whole(2), help=f"tokens per window (default {TOKENS}, or the model's most)")
    parser.add_argument("--most", type=whole(1), default=200, help="variants to run at most (default 200)")
    add_shared(parser, "--device", "--trust-remote-code", "--json")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Load, calibrate, search; print the verdict and its figures."""
    from qcompile.bisection.bisect import bisect
    from qcompile.checkpoint.loading import from_pretrained, load_float, load_tokenizer, open_folder
    from qcompile.commands.device import device_of

    loading = {"device": device_of(arguments.device), "trust_remote_code": arguments.trust_remote_code}
    check_text(arguments.text)
    folder = open_folder(arguments.model, checksums=False)
    scheme = _scheme(arguments, is_float=folder.quantization_config is None)
    model = (load_float if arguments.against is None else from_pretrained)(folder.path, **loading)
    tokenizer = load_tokenizer(folder.path, trust_remote_code=arguments.trust_remote_code)
    windows = _windows(arguments.text, arguments.windows, arguments, model, tokenizer, split="held_out")
    search: dict[str, Any] = {"threshold": arguments.threshold, "most": arguments.most}
    if arguments.against is not None:
        search["against"] = load_float(arguments.against, **loading)
    else:
        search |= _options(arguments, scheme, model, tokenizer)
    with _bar() as told:
        found = bisect(model, windows, told=told, **search)
    print(found.to_json() if arguments.json else found)


def _scheme(arguments: argparse.Namespace, *, is_float: bool) -> dict[str, Any]:
    """How to quantize. Raises ConfigError for what does not go together."""
    if is_float and arguments.against is not None:
        raise ConfigError(f"--against goes with a quantized model; {arguments.model} is a float one; leave it out")
    if not is_float and arguments.against is None:
        raise ConfigError(f"{arguments.model} is quantized; name the float model it was made from: --against FLOAT")
    return scheme_of(arguments, "passes", "calibration", is_quantized=not is_float)


def _options(arguments: argparse.Namespace, scheme: dict[str, Any], model: Any, tokenizer: Any) -> dict[str, Any]:
    """The pipeline and the backend's options, with a calibration."""
    from qcompile.pass_pipeline import Pipeline
    from qcompile.passes import PASSES

    ignore = tuple(scheme.get("ignore", ("lm_head",)))
    found: dict[str, Any] = {"calibration": _calibration(arguments, ignore, model, tokenizer), **scheme}
    if arguments.passes is not None:
        found["pipeline"] = Pipeline.from_text(arguments.passes, PASSES)
    return found


def _calibration(arguments: argparse.Namespace, ignore: tuple[str, ...], model: Any, tokenizer: Any) -> Any:
    from qcompile.calibration import Calibration
    from qcompile.recording import calibrate

    if arguments.calibration is not None and arguments.calibration.endswith(".safetensors"):
        return Calibration.load(arguments.calibration)
    windows = _windows(arguments.calibration, arguments.samples, arguments, model, tokenizer, split="calibration")
    return calibrate(model, list(windows.split(1)), ignore=ignore, progress=sys.stderr.isatty())


def _windows(
    source: str | None, count: int, arguments: argparse.Namespace, model: Any, tokenizer: Any, *, split: Any
) -> Any:
    from qcompile.calibration_sources import calibration_windows
    from qcompile.model_limits import positions_of, vocabulary_of

    positions = positions_of(model)
    length = arguments.seqlen if arguments.seqlen is not None else min(TOKENS, positions or TOKENS)
    return calibration_windows(
        source, tokenizer, samples=count, seqlen=length, positions=positions, vocabulary=vocabulary_of(model),
        split=split,
    ).windows  # fmt: skip


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str], None]]:
    """A bar of variants run; how many there will be shows only at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("variant {task.completed}: {task.description:32s}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("float", total=None)

        def told(what: str) -> None:
            progress.update(task, description=what)
            progress.advance(task)

        yield told
        progress.update(task, total=progress.tasks[task].completed, description="done")
