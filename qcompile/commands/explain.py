"""`qcompile explain MODEL`: a line per linear."""

import argparse
from typing import Any

from qcompile.commands.arguments import add_scheme, add_shared, scheme_of


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser."""
    parser = commands.add_parser("explain", help="one line per linear: quantized how, smoothed how, or why not")
    parser.add_argument("model", metavar="MODEL", help="folder of a Hugging Face model")
    add_scheme(parser, "--dtype", "--activations", "--ignore")
    parser.add_argument("--weights", action="store_true", help="read them: for models whose code looks at data")
    parser.add_argument("--target", metavar="SM", help="a GPU that need not be here, such as sm90 (default: CPU)")
    add_shared(parser, "--trust-remote-code", "--json")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Read the structure, or the model, explain, print."""
    from qcompile.checkpoint.loading import load_either
    from qcompile.explanation import explain
    from qcompile.quantized_linear import is_quantized
    from qcompile.structure import load_structure

    trust = arguments.trust_remote_code
    if arguments.weights:
        model, _ = load_either(arguments.model, trust_remote_code=trust)
    else:
        model = load_structure(arguments.model, trust_remote_code=trust)
    found = explain(model, target=arguments.target, **scheme_of(arguments, is_quantized=is_quantized(model)))
    print(found.to_json() if arguments.json else found)
