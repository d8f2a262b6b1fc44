"""Give freed memory back to the operating system.

glibc keeps what was freed between two live blocks. Quantizing frees a model's weights one by one among what takes their
place, so that without this most of the float model would still count as resident.
"""

import ctypes
import functools
import gc
from collections.abc import Callable
from typing import Any


def give_back(*, collect: bool = False) -> None:
    """Return free memory to the system where the C library can. collect: break reference cycles first."""
    if collect:
        gc.collect()
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], Any] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # not glibc
        return None
