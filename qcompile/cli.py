"""The command line. A user's mistake is one line on stderr and exit status 2, never a traceback."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

import qcompile
from qcompile.commands import (
    bench,
    bisect,
    demo,
    doctor,
    evaluate,
    explain,
    generate,
    opt,
    passes,
    quantize,
    report,
    serve,
    tune,
)
from qcompile.commands.arguments import Parser
from qcompile.errors import OtherRankError, QCompileError

# As --help lists them: what a model goes through, then what looks at it, then the machine.
COMMANDS = (demo, explain, quantize, evaluate, bisect, opt, report, generate, serve, doctor, tune, bench, passes)


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
    except KeyboardInterrupt:
        print("qcompile: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `qcompile opt … | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="qcompile", description="W8A8 for Hugging Face models, by compilation.")
    parser.add_argument("--version", action="version", version=f"qcompile {qcompile.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return parser
