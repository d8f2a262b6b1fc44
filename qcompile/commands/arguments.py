"""What the commands' options have in common: types that check, and a parser whose complaints are one line.

The modules of commands import what they run where they run it, so that help and mistakes need no torch and no second.
"""

import argparse
import contextlib
from collections.abc import Callable
from typing import Any, NoReturn

from qcompile.errors import ConfigError

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
