"""Write a folder completely or not at all.

Everything goes into a hidden sibling, which takes the wanted name when it is whole and on disk. A process that is
killed leaves the sibling behind, under a name that nobody asks for and without the file that readers need first.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qcompile.atomic_file import beside
from qcompile.errors import CheckpointError


@contextlib.contextmanager
def atomic_folder(target: Path, *, overwrite: bool, last: str) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends without an exception.

    overwrite: replace what is there; without it, only an empty folder may be there. last: the file readers need first;
    it is written under another name and gets this one in the end. Raises CheckpointError, also for what the block could
    not write; then nothing is left behind, and what was there is as it was.
    """
    check_target(target, overwrite=overwrite)
    target = target.resolve()  # a link stays
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        begun = beside(target, "partial")
        begun.mkdir()
        partial = begun
        yield partial
        _publish(partial, target, last, overwrite=overwrite)
    except OSError as error:
        raise CheckpointError(_reason(target, error)) from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raises CheckpointError if the folder must not be written, or cannot be; leaves no trace."""
    place = target.resolve()
    try:
        if place.exists() and not place.is_dir():
            raise CheckpointError(f"the output must be a folder; {target} is a file; choose another name")
        if place.is_dir() and (place in (here := Path.cwd(), *here.parents) or place.is_mount()):
            what = "is a mount point" if place.is_mount() else "holds the folder that you are in"
            raise CheckpointError(f"the output must be a folder that can be replaced; {target} {what}; choose another")
        if not overwrite and place.is_dir() and any(place.iterdir()):
            raise CheckpointError(
                f"the output must not exist yet; {target} has files; choose another, or pass --overwrite"
            )
        trial = beside(_above(place) / place.name, "partial")
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        raise CheckpointError(_reason(target, error)) from None


def _publish(partial: Path, target: Path, last: str, *, overwrite: bool) -> None:
    for file in sorted(partial.rglob("*")):
        _sync(file)
    (partial / f"{last}.partial").rename(partial / last)
    _sync(partial)
    if not target.exists():
        partial.rename(target)
    elif not overwrite:
        target.rmdir()  # empty, or somebody was faster: then this raises
        partial.rename(target)
    else:
        old = beside(target, "old")
        old.mkdir()
        moved = old / target.name
        try:
            target.rename(moved)
            partial.rename(target)
        except OSError:
            if moved.exists():
                moved.rename(target)
            old.rmdir()
            raise
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _above(path: Path) -> Path:
    """The nearest folder above that exists."""
    return next(parent for parent in path.parents if parent.exists())


def _reason(target: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(_above(target.resolve())).free / 2**20
        return f"{target} needs more space than there is ({free:.0f} MiB free); nothing was written; make room"
    return f"{target} cannot be written: {error}; nothing was written; choose another place"
