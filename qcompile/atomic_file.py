"""Write a file completely or not at all."""

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from qcompile.errors import ConfigError, QCompileError
from qcompile.paths import expanded


def write_file(path: str | PathLike[str], text: str) -> None:
    """Put text into a file, replacing what is there; if that fails, what was there is as it was. Raises ConfigError."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def check_file(path: str | PathLike[str]) -> None:
    """Raises ConfigError if `replacing` could not begin with a file; leaves no trace."""
    with contextlib.suppress(_Begun), replacing(path):
        raise _Begun


class _Begun(Exception):
    """The block was reached."""


@contextlib.contextmanager
def replacing(path: str | PathLike[str], error: type[QCompileError] = ConfigError) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place when the block ends well. Raises `error` for what the system
    refuses."""
    target = expanded(path)
    partial: Path | None = None
    try:
        target = target.resolve() if target.is_symlink() else target
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if target.exists() and not target.is_file():
            with tempfile.TemporaryDirectory() as folder:
                partial = Path(folder, "whole")
                partial.touch()
                yield partial
                target.write_bytes(partial.read_bytes())  # a device or a pipe: it stays what it is
            return
        begun = beside(target, "partial")
        begun.touch(exist_ok=False)
        partial = begun
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as refused:
        raise error(f"{target} cannot be written: {refused.strerror or refused}; choose another place") from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def beside(target: Path, what: str) -> Path:
    """A hidden name next to `target` that nobody has. tempfile's own files would be readable by their owner only."""
    return target.parent / f".{target.name}.{what}-{secrets.token_hex(4)}"
