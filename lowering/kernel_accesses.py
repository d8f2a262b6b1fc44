"""What a Triton kernel reads and writes, found out once per form instead of at every call.

To see which arguments a kernel writes, torch has Triton lower it, three times for each of its calls in a graph. That is
more than a third of the time that a decoder takes to compile, whose layers call the same few kernels. The answer
depends on the kernel, on its tensors' dtypes and on its other arguments.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import Tensor

NAMES = ("identify_accessed_tensors", "identify_mutated_tensors")  # since torch 2.13, and before
MOST = 1024  # forms that are remembered
_known: dict[Any, Any] = {}


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Let torch ask once per form while this lasts. Where it asks otherwise than known, nothing changes."""
    from torch._higher_order_ops import triton_kernel_wrap

    name = next((name for name in NAMES if hasattr(triton_kernel_wrap, name)), None)
    if name is None:
        yield
        return
    find = getattr(triton_kernel_wrap, name)

    def look_up(kernel: Any, kwargs: dict[str, Any], *rest: Any) -> Any:
        if any(rest):  # descriptors that the host made: none of our kernels has any
            return find(kernel, kwargs, *rest)
        # The function, since Inductor makes the kernel anew for each call.
        key = (getattr(kernel, "fn", kernel), tuple((argument, _kind(value)) for argument, value in kwargs.items()))
        if key not in _known:
            if len(_known) >= MOST:
                _known.clear()
            _known[key] = find(kernel, kwargs, *rest)
        return _known[key]

    with mock.patch.object(triton_kernel_wrap, name, look_up):
        yield


def _kind(value: Any) -> Any:
    """What counts of an argument: a tensor's dtype, be it torch's or Inductor's, or a number as it is."""
    if isinstance(value, Tensor):
        return "tensor", value.dtype
    if hasattr(value, "get_dtype"):
        return "tensor", value.get_dtype()
    return type(value).__name__, str(value)
