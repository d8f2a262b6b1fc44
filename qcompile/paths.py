"""Paths as users give them, to functions, options and commands alike."""

import os
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path, with a `~` or `~name` that it begins with replaced by that user's home, if there is such a user."""
    return Path(os.path.expanduser(path))
