"""`qcompile tune`: measure the tiles for a model's products on this machine's GPU, and keep the fastest in a table."""

import argparse
import sys
from typing import Any

from qcompile.atomic_file import check_file, write_file
from qcompile.commands.arguments import DTYPES, add_shared, whole
from qcompile.errors import ConfigError


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser."""
    parser = commands.add_parser("tune", help="measure kernel tiles for a model on this GPU; writes a table")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder of a Hugging Face model; weights not read")
    parser.add_argument("--shape", action="append", default=[], metavar="N,K", help="a weight's shape; repeatable")
    parser.add_argument("--tokens", nargs="+", type=whole(1), default=[1, 32, 128, 512, 2048, 8192], metavar="M")
    parser.add_argument("--dtype", default="int8", choices=DTYPES)
    parser.add_argument("--out", default="tiles.json", metavar="FILE", help="the table (default tiles.json)")
    add_shared(parser, "--trust-remote-code")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and write. Raises ConfigError, LoweringError."""
    shapes = [_shape(text) for text in arguments.shape]
    if arguments.model is None and not shapes:
        raise ConfigError("tune needs shapes to measure; got none; give MODEL or --shape N,K")
    check_file(arguments.out)
    from qcompile.bench.tuning import Bench, gpu_for, shapes_of, tune
    from qcompile.structure import load_structure

    target = gpu_for(arguments.dtype)
    if arguments.model is not None:
        model = load_structure(arguments.model, trust_remote_code=arguments.trust_remote_code)
        shapes += shapes_of(model, arguments.dtype)
    bench = Bench(target)
    bench.compile_ahead(shapes, arguments.tokens, [arguments.dtype], _tell)
    table = tune(shapes, arguments.tokens, arguments.dtype, target, bench.measure, _tell)
    write_file(arguments.out, table.to_json())
    print(f'{len(table.rows)} tiles written to {arguments.out}; use them with options={{"tiles": "{arguments.out}"}}')


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _shape(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"a shape must be N,K, such as 4096,14336; got {text!r}")
    return int(parts[0]), int(parts[1])
