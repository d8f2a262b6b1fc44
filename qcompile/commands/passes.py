"""`qcompile passes`: the passes, their options, and the pipelines that are made of them."""

import argparse
import dataclasses
import json
from typing import Any

from qcompile.commands.arguments import add_shared


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser."""
    parser = commands.add_parser("passes", help="list the passes, their options, and the default pipelines")
    add_shared(parser, "--json")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the list."""
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
