"""`qcompile report MODEL`: what the compiler did to a model, as one HTML page."""

import argparse
import sys
from pathlib import Path
from typing import Any

from qcompile.atomic_file import check_file
from qcompile.commands.arguments import add_scheme, add_shared, check_text, scheme_of, whole
from qcompile.errors import ConfigError


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser."""
    parser = commands.add_parser("report", help="one HTML page: passes, linears, plots and a layer's graph")
    parser.add_argument("model", metavar="MODEL", help="float or quantized model folder; config.json alone will do")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="page to write (default report.html)")
    parser.add_argument("--calibration", metavar="SOURCE", help="text, as for quantize (default: random tokens)")
    parser.add_argument("--field", help="field of the records that holds text or chat messages")
    parser.add_argument("--samples", type=whole(1), default=8, help="calibration windows (default 8)")
    parser.add_argument("--seqlen", type=whole(2), default=256, help="most tokens per window (default 256)")
    parser.add_argument("--text", metavar="FILE", help="text to measure quality against float on")
    parser.add_argument("--windows", type=whole(1), default=8, help="most windows of it (default 8)")
    parser.add_argument("--against", metavar="FLOAT", help="float model that a quantized MODEL was made from")
    parser.add_argument("--bench", metavar="FILE", help="what `qcompile bench --json` printed")
    parser.add_argument("--no-weights", action="store_true", help="read no weights, only what the files say of them")
    parser.add_argument("--no-validate", action="store_true", help="do not run the graphs; leaves numbers out")
    add_scheme(parser, "--dtype", "--activations", "--alpha", "--ignore")
    parser.add_argument("--target", metavar="SM", help="a GPU that need not be here, such as sm90 (default: CPU)")
    parser.add_argument("--dot", metavar="FILE", help="also write the graph after all passes for Graphviz")
    parser.add_argument("--graphml", metavar="FILE", help="also write it as GraphML")
    add_shared(parser, "--device", "--trust-remote-code")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Load what there is, report, write."""
    from qcompile.checkpoint.loading import resolve
    from qcompile.commands.quantize import public_name
    from qcompile.reporting.html_page import check_extra
    from qcompile.reporting.report import report

    check_extra()
    for path in filter(None, (arguments.out, arguments.dot, arguments.graphml)):
        check_file(path)
    check_text(arguments.text)
    folder = resolve(arguments.model)
    model, is_stored = _model(arguments, folder)
    scheme = scheme_of(arguments, is_quantized=is_stored)
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    source, calibration, note = _calibration(arguments, folder, model, on_meta or is_stored)
    notes = [note] if note else []
    if on_meta and arguments.text is not None:
        notes.append("the text to measure quality on was not read: there are no weights")
    found = report(
        model, arguments.out, calibration=calibration, windows=None if on_meta else _windows(arguments, folder, model),
        against=_against(arguments, is_stored), bench=arguments.bench, validate=not arguments.no_validate,
        target=arguments.target, name=public_name(arguments.model), notes=notes, **scheme,
    )  # fmt: skip
    for line in notes:
        print(f"qcompile: {line}", file=sys.stderr)
    _export(arguments, found.graphs)
    print(f"wrote {arguments.out}: {len(found.data['linears'])} linears in {len(found.graphs)} graphs{source}")


def _model(arguments: argparse.Namespace, folder: Path) -> tuple[Any, bool]:
    """The model, on the meta device if there are no weights to read; and whether it is quantized."""
    from qcompile.checkpoint.loading import load_either
    from qcompile.commands.device import device_of
    from qcompile.quantized_linear import is_quantized
    from qcompile.structure import load_structure

    if arguments.no_weights or not any(folder.glob("*.safetensors")):
        structure = load_structure(str(folder), trust_remote_code=arguments.trust_remote_code)
        return structure, is_quantized(structure)
    return load_either(folder, device=device_of(arguments.device), trust_remote_code=arguments.trust_remote_code)


def _calibration(
    arguments: argparse.Namespace, folder: Path, model: Any, unused: bool
) -> tuple[str, list[Any] | None, str]:
    """What was read, in words; batches; what the user should know."""
    if arguments.calibration is None:
        return "", None, ""
    if unused:
        return "", None, "the calibration text was not read: there are no float weights to calibrate"
    from qcompile.quality.window_calls import window_call

    text = _text(arguments, folder, model, arguments.calibration, arguments.samples, "calibration")
    batches = [window_call(model, ids[None], logits=False).arguments for ids in text.windows]
    return f", calibrated on {text.source}", batches, text.note


def _windows(arguments: argparse.Namespace, folder: Path, model: Any) -> Any:
    if arguments.text is None:
        return None
    return _text(arguments, folder, model, arguments.text, arguments.windows, "held_out").windows


def _text(arguments: argparse.Namespace, folder: Path, model: Any, source: str, samples: int, split: Any) -> Any:
    from qcompile.calibration_sources import calibration_windows
    from qcompile.checkpoint.loading import load_tokenizer
    from qcompile.model_limits import positions_of, vocabulary_of
    from qcompile.quality.window_calls import check_callable

    positions = positions_of(model)
    found = calibration_windows(
        source, load_tokenizer(folder, trust_remote_code=arguments.trust_remote_code), samples=samples,
        seqlen=min(arguments.seqlen, positions or arguments.seqlen), positions=positions,
        vocabulary=vocabulary_of(model), field=arguments.field, split=split,
    )  # fmt: skip
    check_callable(model, found.windows)
    return found


def _against(arguments: argparse.Namespace, is_stored: bool) -> Any:
    from qcompile.checkpoint.loading import load_float
    from qcompile.commands.device import device_of

    if arguments.against is None:
        return None
    if not is_stored:
        raise ConfigError(f"against is for a quantized model; {arguments.model} is compared with itself in float")
    device = device_of(arguments.device)
    return load_float(arguments.against, device=device, trust_remote_code=arguments.trust_remote_code)


def _export(arguments: argparse.Namespace, graphs: Any) -> None:
    from qcompile.reporting.graph_export import to_networkx, write_dot, write_graphml

    largest = max(graphs, key=lambda gm: len(gm.graph.nodes))
    if arguments.dot:
        write_dot(to_networkx(largest), arguments.dot)
    if arguments.graphml:
        write_graphml(to_networkx(largest), arguments.graphml)
