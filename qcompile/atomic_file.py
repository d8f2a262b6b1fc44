"""Write a file completely or not at all."""

import os
import tempfile
from pathlib import Path

from qcompile.errors import ConfigError


def write_file(path: str | Path, text: str) -> None:
    """Put text into a file, replacing what is there; if that fails, what was there is as it was. Raises ConfigError."""
    target = Path(path).expanduser()
    partial: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.partial-", dir=target.parent)
        partial = Path(name)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~umask())
        partial.replace(target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}; choose another place") from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def umask() -> int:
    """The permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
