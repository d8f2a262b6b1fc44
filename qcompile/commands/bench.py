"""`qcompile bench MODEL`: float and quantized variants, timed in turns."""

import argparse
import sys
from typing import Any

from qcompile.commands.arguments import THREADS, add_shared, whole


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser."""
    parser = commands.add_parser("bench", help="time float and quantized variants of a model in turns")
    parser.add_argument("model", metavar="MODEL", help="folder of a model, or a named shape such as llama-100m")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help='such as "decode, batch 1"; default: all')
    parser.add_argument("--rounds", type=whole(2), default=15, help="of every case (default 15)")
    parser.add_argument("--threads", type=whole(0, THREADS), default=0, help="of each variant; default: torch's choice")
    add_shared(parser, "--json")
    parser.add_argument("--plot", metavar="FILE", help="draw it, as .svg, .png or .pdf")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Time, print, draw."""
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
