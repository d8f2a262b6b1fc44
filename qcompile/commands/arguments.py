"""What the commands' options have in common: types that check, and a parser whose complaints are one line.

The modules of commands import what they run where they run it, so that help and mistakes need no torch and no second.
"""

import argparse
import contextlib
from collections.abc import Callable
from typing import Any, NoReturn

from qcompile.errors import ConfigError
from qcompile.paths import expanded

MOST = 2**31 - 1
SEED = 0, 2**64 - 1  # what torch's generators take
THREADS = 4096
DTYPES = ("int8", "fp8", "fp8_e5m2")
SHARED: dict[str, dict[str, Any]] = {
    "--device": {"default": "auto", "choices": ("auto", "cpu", "cuda")},
    "--inner": {"default": "auto", "choices": ("auto", "inductor", "eager"), "help": "how it is compiled"},
    "--trust-remote-code": {"action": "store_true", "help": "run code that comes with the model"},
    "--json": {"action": "store_true", "help": "print JSON"},
}


class Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and end the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def add_shared(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add options that mean the same in every command."""
    for name in names:
        parser.add_argument(name, **SHARED[name])


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """The type of an option that is a whole number in a range."""
    allowed = f"at least {least}" if most == MOST else f"in {least}…{most}"

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= (value := int(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"must be a whole number, {allowed}; got {text[:40]!a}")

    return read


def utf8(text: str) -> str:
    """The type of an option that is text for a model: bytes of the command line that are no UTF-8 are refused."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"must be text in UTF-8; got {text[error.start]!a}") from None
    return text


def filled(text: str) -> str:
    """The same, of at least one character."""
    if not text:
        raise argparse.ArgumentTypeError("must be a text of at least one character; it is empty")
    return utf8(text)


def migration_strength(text: str) -> float | str | None:
    """The type of α: a number, "auto", or "none" for no smoothing."""
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number in 0…1, auto, or none; got {text[:40]!a}") from None


def check_text(path: str | None) -> None:
    """Raises ConfigError if a text to score on is not there: one asked for by mistake is not looked for on a hub."""
    if path is not None and not expanded(path).exists():
        raise ConfigError(f"--text must be a file or a folder; there is no {path}")


# How a float model is quantized; what is not given is the backend's to choose.
SCHEME: dict[str, dict[str, Any]] = {
    "--dtype": {"choices": DTYPES, "help": "default int8"},
    "--activations": {"choices": ("token", "tensor", "static"), "help": "default token"},
    "--clip": {"choices": ("none", "percentile", "mse"), "help": "of static ranges"},
    "--alpha": {"type": migration_strength, "help": "0…1, auto, or none (default 0.5)"},
    "--ignore": {"nargs": "*", "metavar": "PATTERN", "help": "linears to leave in float, instead of lm_head"},
}


def add_scheme(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add options of SCHEME."""
    for name in names:
        parser.add_argument(name, default=argparse.SUPPRESS, **SCHEME[name])


def scheme_of(arguments: argparse.Namespace, *more: str, is_quantized: bool) -> dict[str, Any]:
    """The options of SCHEME that were given, as the backend takes them. more: others that are about quantizing, None if
    not given. Raises ConfigError if one is given for a model that is quantized already."""
    known = {name: getattr(arguments, name) for name in (key[2:] for key in SCHEME) if hasattr(arguments, name)}
    given = [*known, *(name for name in more if getattr(arguments, name) is not None)]
    if is_quantized and given:
        raise ConfigError(f"--{given[0]} is about quantizing; {arguments.model} is quantized already; leave it out")
    return known
