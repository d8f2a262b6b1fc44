"""What torch loads when it meets backend="w8a8": the backend, and a watch for the one trap it cannot see.

`torch.compile(model, backend="w8a8").generate(…)` looks up `generate` on the original model, so no graph ever reaches a
backend and the float model runs. Nothing can be hooked at that moment; at exit, a process that asked for w8a8 and never
compiled anything is told.
"""

import atexit
import warnings
from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

from qcompile import backend

_called = False


def w8a8(gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """The registered backend; see qcompile.backend.w8a8."""
    global _called
    _called = True
    return backend.w8a8(gm, example_inputs, **kwargs)


@atexit.register
def _warn_if_never_called() -> None:
    if not _called:
        warnings.warn(
            'backend="w8a8" was asked for, but no graph reached it: everything ran in float. '
            "torch.compile(model).generate() calls the original model; use model.compile(backend='w8a8') instead",
            stacklevel=1,
        )
