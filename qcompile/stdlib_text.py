"""Text that every Python installation has: the sources of its standard library.

Calibrating and scoring a language model takes text.  Shipping a corpus would make the package
large and downloading one would make results depend on the network, whereas the standard library
is already there: megabytes of code and English docstrings.  Each file is assigned to a split by
a hash of its path alone, so a file held out on one Python version is held out on all of them.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from qcompile.errors import ConfigError

Split = Literal["train", "calibration", "held_out"]

HELD_OUT_FRACTION = 0.05
CALIBRATION_FRACTION = 0.03

MIN_BYTES = 256
MAX_BYTES = 150_000  # larger files are mostly generated tables

_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "encodings", "idle_test", "lib2to3", "site-packages", "test", "tests"}
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")  # generated when Python is built, different on each machine


def stdlib_text(split: Split) -> str:
    """Return every file of `split`, in the order of their paths, joined by newlines."""
    return "\n".join(stdlib_files(split).values())


def stdlib_files(split: Split) -> dict[str, str]:
    """Return the files of `split` as {path relative to the library: text}, sorted by path."""
    if split not in get_args(Split):
        raise ConfigError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in _source_paths(root) if _split_of(path) == split)
    texts = ((path, _read(root / path)) for path in paths)
    files = {path: text for path, text in texts if text is not None}
    if not files:
        raise ConfigError(
            f"the standard library must be installed as .py files, found none for {split!r} in {root}: "
            "use a Python whose library is not zipped or stripped, or pass text of your own"
        )
    return files


def _source_paths(root: Path) -> Iterator[str]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = filter(_is_wanted, subfolders)  # os.walk does not descend into what is removed here
        for name in filter(_is_wanted, names):
            if name.endswith(".py"):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _is_wanted(name: str) -> bool:
    return name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)


def _split_of(path: str) -> Split:
    # A module that a later Python turns into a package (zipfile.py, zipfile/__init__.py) keeps its split.
    module = PurePosixPath(path.removesuffix("/__init__.py")).with_suffix("").as_posix()
    digest = hashlib.sha256(module.encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < HELD_OUT_FRACTION:
        return "held_out"
    return "calibration" if position < HELD_OUT_FRACTION + CALIBRATION_FRACTION else "train"


def _read(file: Path) -> str | None:
    """Return the text of `file`, or None where it is not ordinary UTF-8 prose or code."""
    if not MIN_BYTES <= file.stat().st_size <= MAX_BYTES:
        return None
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
