"""Versions of what is installed."""

import importlib.metadata


def installed(package: str) -> str | None:
    """A package's version; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
