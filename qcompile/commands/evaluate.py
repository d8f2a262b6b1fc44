"""`qcompile evaluate DIR`: what a quantized folder is worth."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from qcompile.commands.arguments import add_shared, check_text, whole
from qcompile.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 5


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser."""
    parser = commands.add_parser(
        "evaluate", help="perplexity, distance from the float model, worst layers, speed, memory"
    )
    parser.add_argument("model", metavar="DIR", help="quantized (or float) model folder")
    parser.add_argument("--against", metavar="MODEL", help="float model to compare with")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="text to score on (default: built-in)")
    source.add_argument("--dataset", metavar="NAME", help="hub dataset, or a JSONL or Parquet file, to score on")
    parser.add_argument("--field", help="field of the records that holds text or chat messages")
    parser.add_argument("--seqlen", type=whole(2), help="tokens per window (default 2048, or what the model takes)")
    parser.add_argument("--windows", type=whole(1), default=64, help="most windows to score (default 64)")
    parser.add_argument("--batch-size", type=whole(1), default=1)
    add_shared(parser, "--inner", "--device", "--trust-remote-code", "--json")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Load, score, compare; print figures."""
    from qcompile.checkpoint.loading import load_either, load_float, load_tokenizer
    from qcompile.commands.device import device_of
    from qcompile.model_limits import check_same_tokens
    from qcompile.quality.checkpoint import evaluate_checkpoint
    from qcompile.quality.window_calls import check_callable

    options = {"device": device_of(arguments.device), "trust_remote_code": arguments.trust_remote_code}
    check_text(arguments.text)
    model, is_quantized = load_either(arguments.model, **options)
    against = None if arguments.against is None else load_float(arguments.against, **options)
    if against is not None:
        check_same_tokens(model, against)
    tokenizer = load_tokenizer(arguments.model, trust_remote_code=arguments.trust_remote_code)
    windows = _windows(arguments, model, tokenizer)
    check_callable(model, windows)
    forward = _compiled(model, arguments.inner) if is_quantized else model
    with _bar(len(windows) // arguments.batch_size) as advance:
        found = evaluate_checkpoint(
            model, windows, batch=arguments.batch_size, against=against, forward=forward, advance=advance
        )
    print(found.to_json() if arguments.json else _text(found))


def _windows(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> "Tensor":
    from qcompile.calibration_sources import calibration_windows
    from qcompile.model_limits import positions_of, vocabulary_of

    text = calibration_windows(
        arguments.text or arguments.dataset, tokenizer, samples=arguments.windows, seqlen=arguments.seqlen,
        positions=positions_of(model), vocabulary=vocabulary_of(model), field=arguments.field, split="held_out",
    )  # fmt: skip
    whole = len(text.windows) // arguments.batch_size * arguments.batch_size
    if not whole:
        raise ConfigError(f"the text must fill one batch of {arguments.batch_size} windows; it has {len(text.windows)}")
    return text.windows[:whole]


def _compiled(model: Any, inner: str) -> Any:
    import torch

    from qcompile.lowering.inductor import choose_inner

    return torch.compile(model, backend="w8a8", options={"inner": choose_inner(inner)}, dynamic=False)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("scoring", total=total)
        yield lambda: progress.advance(task)


def _text(found: Any) -> str:
    lines = [
        f"perplexity {found.perplexity:.4f} (mean NLL {found.nll:.5f}) over {found.tokens} tokens: {found.windows} "
        f"windows of {found.size}, not overlapping, each from its own beginning",
        f"{found.tokens_per_second:,.0f} tokens/s, weights {found.weight_bytes / 2**20:,.1f} MiB, "
        f"peak memory {found.peak_bytes / 2**20:,.0f} MiB",
    ]
    if found.against is not None:
        other = found.against
        lines.append(
            f"against the float model: NLL {found.nll - other.nll:+.5f}, KL {other.kl:.6f}, "
            f"top-1 agreement {other.top1:.2%}"
        )
        worst = sorted(other.sqnr.items(), key=lambda item: item[1])[:SHOWN]
        lines += [f"  {name}: SQNR {value:.1f} dB" for name, value in worst]
    return "\n".join(lines)
