"""`qcompile demo`: calibrate, quantize and compile the model that ships with the package."""

import argparse
from typing import Any

from qcompile.commands.arguments import whole


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser."""
    parser = commands.add_parser("demo", help="calibrate, quantize and compile the demo model; print quality and speed")
    parser.add_argument("--windows", type=whole(1), default=32, help="windows of 256 tokens to score (default 32)")
    parser.add_argument("--dump", default="qcompile_debug/demo", help="folder for the graphs before and after passes")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from qcompile import demonstration

    demonstration.run(windows=arguments.windows, dump=arguments.dump)
