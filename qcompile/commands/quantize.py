"""`qcompile quantize MODEL --out DIR`: from a float folder to a W8A8 folder."""

import argparse
import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Any

from qcompile.commands.arguments import SEED, add_scheme, add_shared, scheme_of, whole
from qcompile.errors import ConfigError
from qcompile.paths import expanded
from qcompile.strict_json import to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

QUALITY_TOKENS = 512  # at most so many tokens of a held-out window are scored


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser."""
    parser = commands.add_parser(
        "quantize", help="write a W8A8 model folder that vLLM, SGLang, LMDeploy and others read"
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a float model, in safetensors")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    add_scheme(parser, "--dtype", "--alpha", "--clip", "--ignore")
    parser.add_argument("--activations", default="token", choices=("token", "static"), help="that files can hold")
    parser.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="text, JSONL or Parquet file, folder, or hub dataset (default: built-in)",
    )
    parser.add_argument("--field", help="field of the records that holds text or chat messages")
    parser.add_argument("--samples", type=whole(1), default=128, help="calibration windows (default 128)")
    parser.add_argument("--seqlen", type=whole(2), help="tokens per window (default 2048, or what the model takes)")
    parser.add_argument("--batch-size", type=whole(1), default=1)
    parser.add_argument("--quality", type=whole(0), default=4, metavar="N", help="held-out windows scored (default 4)")
    parser.add_argument("--format", default="compressed-tensors", choices=("compressed-tensors", "lmdeploy"))
    add_shared(parser, "--device")
    parser.add_argument("--dtype-load", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--seed", type=whole(*SEED), default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is a model folder")
    add_shared(parser, "--trust-remote-code", "--json")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Load, calibrate, quantize, score, write; print what was done."""
    import torch

    from qcompile.calibration_sources import calibration_windows
    from qcompile.checkpoint.loading import load_float, load_tokenizer, open_folder
    from qcompile.checkpoint.saving import save_pretrained
    from qcompile.commands.device import device_of
    from qcompile.model_limits import positions_of, vocabulary_of
    from qcompile.quality.window_calls import check_callable, window_call
    from qcompile.quantizing import quantize

    started = time.perf_counter()
    scheme = _checked(arguments)
    torch.manual_seed(arguments.seed)
    source = open_folder(arguments.model).path
    tokenizer = load_tokenizer(source, trust_remote_code=arguments.trust_remote_code)
    model = load_float(
        source, dtype=arguments.dtype_load, device=device_of(arguments.device),
        trust_remote_code=arguments.trust_remote_code,
    )  # fmt: skip
    _check_ignore(model, scheme.get("ignore", ()))
    text = calibration_windows(
        arguments.calibration, tokenizer, samples=arguments.samples + arguments.quality, seqlen=arguments.seqlen,
        positions=positions_of(model), vocabulary=vocabulary_of(model), field=arguments.field, seed=arguments.seed,
    )  # fmt: skip
    held_out, windows = _held_out(text.windows, arguments.quality)
    _tell(arguments, text, len(windows), len(held_out))
    check_callable(model, text.windows)
    before = _answers(model, held_out, compiled=False)
    # Nobody reads the logits of a calibration run.
    batches = [window_call(model, ids, logits=False).arguments for ids in torch.split(windows, arguments.batch_size)]
    quantize(model, batches, **scheme, progress=True)
    quality = _quality(before, _answers(model, held_out, compiled=True))
    record = dataclasses.replace(
        model.qcompile_record, model=public_name(arguments.model), source=public_name(text.source), quality=quality
    )
    model.qcompile_record = record
    save_pretrained(
        model, arguments.out, tokenizer=tokenizer, format=arguments.format, source=source, overwrite=arguments.overwrite
    )
    _print(arguments, record, time.perf_counter() - started)


def _checked(arguments: argparse.Namespace) -> dict[str, Any]:
    """How to quantize. Raises ConfigError and CheckpointError for what can be known before the long part."""
    from qcompile.atomic_folder import check_target
    from qcompile.checkpoint import formats
    from qcompile.checkpoint.folder import CONFIG
    from qcompile.checkpoint.formats import Scheme
    from qcompile.config import Config

    scheme = scheme_of(arguments, is_quantized=False)
    config = Config(**scheme, calibrate=1)
    formats.write(arguments.format, {Scheme(config.dtype, config.activations == "static"): []}, [], [])
    read = [expanded(name) for name in (arguments.model, arguments.calibration) if name is not None]
    check_target(expanded(arguments.out), overwrite=arguments.overwrite, last=CONFIG, read=read)
    return scheme


def _tell(arguments: argparse.Namespace, text: Any, calibrated: int, held_out: int) -> None:
    """What the user should know of the windows."""
    if text.note:
        print(f"qcompile: {text.note}", file=sys.stderr)
    if calibrated < arguments.samples or held_out < arguments.quality:
        count, size = text.windows.shape
        print(
            f"qcompile: {text.source} fills {count} windows of {size} tokens; {calibrated} of {arguments.samples} are "
            f"calibrated on, {held_out} of {arguments.quality} held out",
            file=sys.stderr,
        )


def public_name(name: str) -> str:
    """A hub name as it is, a path by its last part: the record goes wherever the folder goes."""
    path = expanded(name)
    return path.resolve().name if path.exists() else name


def _check_ignore(model: Any, patterns: "Sequence[str]") -> None:
    """Raises ConfigError for a pattern that no linear matches, and so changes nothing; but for the default, which not
    every model has."""
    from qcompile.passes.find_linears import known_as, matches

    matrices = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.ndim >= 2]
    called = {one for name in matrices for one in known_as(name)}
    for pattern in patterns:
        if pattern != "lm_head" and not any(matches(one, (pattern,)) for one in called):
            raise ConfigError(
                f"ignore must match linears; {pattern} matches none of {type(model).__name__}; see their names with "
                "qcompile explain"
            )


def _held_out(windows: "Tensor", wanted: int) -> "tuple[Tensor, Tensor]":
    """Windows to score and windows to calibrate on; the latter get what there is when there are few."""
    count = min(wanted, len(windows) // 4)
    return windows[:count, :QUALITY_TOKENS], windows[count:]


def _answers(model: Any, windows: "Tensor", *, compiled: bool) -> "tuple[float, Tensor] | None":
    """Mean negative log-likelihood and most likely tokens on held-out windows; None for a model without such logits."""
    import torch

    from qcompile.quality.window_calls import token_logits, window_call

    if not len(windows):
        return None
    run: Any = model
    if compiled:
        run = torch.compile(model, backend="w8a8", options={"inner": "eager"}, dynamic=False)
    nll, likely = 0.0, []
    with torch.no_grad():
        for ids in torch.split(windows, 1):
            call = window_call(model, ids)
            found = token_logits(run(**call.arguments))
            if found is None:
                return None
            logits = found[0, :-1]
            likely.append(logits.argmax(-1).cpu())
            nll += float(torch.nn.functional.cross_entropy(logits.float(), call.read[0, 1:]))
    return nll / len(windows), torch.cat(likely)


def _quality(before: "tuple[float, Tensor] | None", after: "tuple[float, Tensor] | None") -> dict[str, float]:
    if before is None or after is None:
        return {}
    same = float((before[1] == after[1]).float().mean())
    return {
        "held-out NLL of the float model": before[0],
        "held-out NLL, change": after[0] - before[0],
        "top-1 agreement": same,
    }


def _print(arguments: argparse.Namespace, record: Any, seconds: float) -> None:
    from qcompile.quality.checkpoint import peak_bytes
    from qcompile.record import by_reason

    figures = {**dataclasses.asdict(record), "out": arguments.out, "seconds": seconds, "peak_bytes": peak_bytes()}
    if arguments.json:
        print(to_json(figures))
        return
    for names, reason in by_reason(record.kept):
        print(f"in float: {names}: {reason}")
    for names, reason in by_reason(record.unsmoothed):
        print(f"quantized without smoothing, which has no place in the format: {names}: {reason}")
    for name, value in record.quality.items():
        print(f"{name}: {value:+.4f}" if "change" in name else f"{name}: {value:.4f}")
    print(f"wrote {arguments.out} in {seconds:.0f} s, peak memory {peak_bytes() / 2**20:.0f} MiB")
