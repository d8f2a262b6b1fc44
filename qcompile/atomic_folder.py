"""Write a folder completely or not at all.

Everything goes into a hidden sibling, which takes the wanted name when it is whole and on disk. A process that is
killed leaves the sibling behind, under a name that nobody asks for and without the file that readers need first.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from qcompile.atomic_file import beside
from qcompile.errors import CheckpointError


@contextlib.contextmanager
def atomic_folder(target: Path, *, overwrite: bool, last: str, read: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends without an exception.

    overwrite, read: see check_target. last: the file readers need first; it is written under another name and gets this
    one in the end. Raises CheckpointError, also for what the block could not write; then nothing is left behind, and
    what was there is as it was.
    """
    check_target(target, overwrite=overwrite, last=last, read=read)
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


def check_target(target: Path, *, overwrite: bool, last: str, read: Sequence[Path] = ()) -> None:
    """Raises CheckpointError if the folder must not be written, or cannot be; leaves no trace.

    overwrite: replace what is there, a folder with a file `last`; without it, only an empty folder may be there. read:
    what the new content comes from; it is not replaced.
    """
    try:
        place = target.resolve()
        if place.exists() and not place.is_dir():
            raise CheckpointError(f"the output must be a folder; {target} is a file; choose another name")
        if reason := _stays(place, read):
            what = "the output must be a folder that can be replaced"
            raise CheckpointError(f"{what}; {target} {reason}; choose another")
        if place.is_dir() and any(place.iterdir()):
            _check_full(target, overwrite=overwrite, last=last)
        trial = beside(_above(place) / place.name, "partial")
        trial.mkdir()
        trial.rmdir()
    except (OSError, RuntimeError) as error:  # RuntimeError: of links that lead to each other, before Python 3.13
        raise CheckpointError(_reason(target, error)) from None


def _stays(place: Path, read: Sequence[Path]) -> str:
    """Why an existing folder cannot give way to another; empty if it can."""
    if not place.is_dir():
        return ""
    if place.is_mount():
        return "is a mount point"
    if place in (here := Path.cwd(), *here.parents):
        return "holds the folder that you are in"
    needed = next((path for path in read if place in (real := path.resolve(), *real.parents)), None)
    return "" if needed is None else f"{'is' if place == needed.resolve() else 'holds'} {needed}, which is read"


def _check_full(target: Path, *, overwrite: bool, last: str) -> None:
    """Raises CheckpointError for a folder with files that stay."""
    if not overwrite:
        raise CheckpointError(
            f"the output must not exist yet; {target} has files; choose another, or pass --overwrite"
        )
    if not (target / last).is_file():
        raise CheckpointError(
            f"only a folder with a {last} is overwritten; {target} has none; choose another, or empty it yourself"
        )


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


def _reason(target: Path, error: OSError | RuntimeError) -> str:
    number = getattr(error, "errno", None)
    if number == errno.ENOTEMPTY:
        return f"{target} must stay empty until it is written; it has files now; nothing was written; choose another"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(_above(target.resolve())).free / 2**20
        return f"{target} needs more space than there is ({free:.0f} MiB free); nothing was written; make room"
    return f"{target} cannot be written: {error}; nothing was written; choose another place"
