"""The option --device."""

from qcompile.errors import ConfigError


def device_of(name: str) -> str:
    """ "auto" is a GPU if there is one. Raises ConfigError."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda needs an NVIDIA GPU that torch can use; there is none; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
