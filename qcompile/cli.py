"""The command line. A user's mistake is one line on stderr and exit status 2, never a traceback."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence

import qcompile
from qcompile.commands import bisect, doctor, evaluate, generate, opt, quantize, report, serve, tune
from qcompile.commands.arguments import THREADS, Parser, whole
from qcompile.errors import OtherRankError, QCompileError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    try:
        arguments = _parser().parse_args(argv)
        command: Callable[[argparse.Namespace], None] = arguments.command
        command(arguments)
    except OtherRankError:
        return 2
    except QCompileError as error:
        print(f"qcompile: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `qcompile opt … | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="qcompile", description="W8A8 for Hugging Face models, by compilation.")
    parser.add_argument("--version", action="version", version=f"qcompile {qcompile.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="calibrate, quantize and compile the demo model; print quality and speed")
    demo.add_argument("--windows", type=whole(1), default=32, help="windows of 256 tokens to score (default 32)")
    demo.add_argument("--dump", default="qcompile_debug/demo", help="folder for the graphs before and after passes")
    demo.set_defaults(command=_demo)

    explain = commands.add_parser("explain", help="one line per linear: quantized how, smoothed how, or why not")
    explain.add_argument("model", metavar="MODEL", help="folder of a Hugging Face model; its weights are not read")
    explain.add_argument("--dtype", default="int8", choices=("int8", "fp8", "fp8_e5m2"))
    explain.add_argument("--activations", default="token", choices=("token", "tensor", "static"))
    explain.add_argument("--ignore", nargs="*", default=["lm_head"], metavar="PATTERN", help="stay in float")
    explain.add_argument("--target", metavar="SM", help="a GPU that need not be here, such as sm90 (default: CPU)")
    explain.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    explain.add_argument("--json", action="store_true", help="print JSON")
    explain.set_defaults(command=_explain)

    quantize.add_to(commands)
    evaluate.add_to(commands)
    bisect.add_to(commands)
    opt.add_to(commands)
    report.add_to(commands)
    generate.add_to(commands)
    serve.add_to(commands)
    doctor.add_to(commands)
    tune.add_to(commands)

    bench = commands.add_parser("bench", help="time float and quantized variants of a model in turns")
    bench.add_argument("model", metavar="MODEL", help="folder of a model, or a named shape such as llama-100m")
    bench.add_argument("--variants", nargs="+", metavar="NAME", help="default: all")
    bench.add_argument("--cases", nargs="+", metavar="CASE", help='such as "decode, batch 1"; default: all')
    bench.add_argument("--rounds", type=whole(2), default=15, help="of every case (default 15)")
    bench.add_argument("--threads", type=whole(0, THREADS), default=0, help="of each variant; default: torch's choice")
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.add_argument("--plot", metavar="FILE", help="draw it, as .svg, .png or .pdf")
    bench.set_defaults(command=_bench)

    passes = commands.add_parser("passes", help="list the passes, their options, and the default pipelines")
    passes.add_argument("--json", action="store_true", help="print JSON")
    passes.set_defaults(command=_passes)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from qcompile.commands import demo

    demo.run(windows=arguments.windows, dump=arguments.dump)


def _explain(arguments: argparse.Namespace) -> None:
    from qcompile.explanation import explain
    from qcompile.structure import load_structure

    model = load_structure(arguments.model, trust_remote_code=arguments.trust_remote_code)
    options = {name: getattr(arguments, name) for name in ("dtype", "activations", "ignore")}
    found = explain(model, target=arguments.target, **options)
    print(found.to_json() if arguments.json else found)


def _bench(arguments: argparse.Namespace) -> None:
    from qcompile.bench import bench, plot

    if arguments.plot:
        plot.check_plot(arguments.plot)
    given = {name: getattr(arguments, name) for name in ("variants", "cases") if getattr(arguments, name)}
    timings = bench.bench(
        arguments.model,
        rounds=arguments.rounds,
        threads=arguments.threads,
        told=lambda line: print(line, file=sys.stderr, flush=True),
        **given,
    )
    print(bench.to_json(timings) if arguments.json else bench.table(timings))
    if arguments.plot:
        plot.write_plot(timings, arguments.plot)


def _passes(arguments: argparse.Namespace) -> None:
    from qcompile.config import Config
    from qcompile.passes import PASSES, observing, quantizing

    config = Config(calibrate=1)
    pipelines = {"observe": observing(config).to_text(), "quantize": quantizing(config).to_text()}
    listed = [
        {
            "name": kind.name,
            "stage": kind.stage,
            "bound": kind.bound,
            "doc": (kind.__doc__ or "").splitlines()[0],
            "options": {field.name: field.default for field in dataclasses.fields(kind)},
        }
        for kind in PASSES
    ]
    if arguments.json:
        print(json.dumps({"passes": listed, "pipelines": pipelines}, indent=2))
        return
    for entry in listed:
        print(f"{entry['name']:18s} {entry['doc']}")
        for option, default in entry["options"].items():
            print(f"{'':18s}   {option}={default!r}")
    for name, text in pipelines.items():
        print(f"\n{name}: {text}")
