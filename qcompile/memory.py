"""Memory: give what was freed back to the operating system; do not search for garbage while compiling.

glibc keeps what was freed between two live blocks. Quantizing frees a model's weights one by one among what takes their
place, so that without this most of the float model would still count as resident.
"""

import contextlib
import ctypes
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def give_back(*, collect: bool = False) -> None:
    """Return free memory to the system where the C library can. collect: break reference cycles first."""
    if collect:
        gc.collect()
    trim = _trim()
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Python's garbage collector rests inside. Compiling makes many objects and keeps most: searching them for garbage
    takes an eighth of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@functools.cache
def _trim() -> Callable[[int], Any] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # not glibc
        return None


Span = tuple[str, int, int]


def span_of(value: object) -> Span | None:
    """The memory that a tensor reaches: device, first address and one past the last. None without memory of its own:
    no tensor, an empty one, one on the meta device or a fake."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor) or value.device.type == "meta":
        return None
    if not torch._C._has_storage(value) or not value.numel() or not (start := value.data_ptr()):
        return None
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return str(value.device), start, start + (last + 1) * value.element_size()
