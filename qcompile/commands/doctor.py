"""`qcompile doctor`: what this machine can run, and what is missing."""

import argparse
import json
from typing import Any

from qcompile.commands.arguments import add_shared


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser."""
    parser = commands.add_parser("doctor", help="what this machine can run: int8 and fp8 per device; what is missing")
    parser.add_argument("--target", metavar="SM", help="also what a GPU that is not here can run, such as sm90")
    add_shared(parser, "--json")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the report."""
    from qcompile.lowering.target import Target
    from qcompile.machine import describe, report

    found = report()
    if arguments.target is not None:
        found["devices"].append(describe(Target.parse(arguments.target), arguments.target, "not in this machine"))
    print(json.dumps(found, indent=2) if arguments.json else _text(found))


def _text(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in found["versions"].items())
    lines = [f"Python {found['python']} on {found['platform']}", versions]
    for device in found["devices"]:
        lines.append(f"{device['device']}: {device['name']}, {device['target']}")
        for dtype, support in device["dtypes"].items():
            state = f"yes, kernel {support['kernel']}" if support["runs"] else "no"
            lines.append(f"  {dtype}: {state}" + (f" ({support['note']})" if support["note"] else ""))
    return "\n".join([*lines, *(f"missing: {what}" for what in found["missing"])])
