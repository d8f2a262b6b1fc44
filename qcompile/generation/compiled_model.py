"""A model compiled in place by the w8a8 backend, and a count of its compilations.

`model.compile` covers every call of the model, so prefill and decode alike. Shapes are fixed (dynamic=False): each
one that is met is a graph of its own, so callers pad to few shapes.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from qcompile.errors import ConfigError

INNERS = ("auto", "inductor", "eager")
# Dynamo counts the graphs of one function and runs it uncompiled, so in slow reference code, beyond its limit of 8.
MOST_GRAPHS = 1024


class Compilations:
    """The backend, counting: `count` graphs so far."""

    def __init__(self, inner: str) -> None:
        self.count = 0
        self._inner = inner

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        from qcompile.plugin import w8a8

        self.count += 1
        return w8a8(gm, example_inputs, options={"inner": self._inner})


def compile_in_place(model: Any, inner: str = "auto") -> Compilations:
    """Compile a model for inference. inner: as in Config; "auto" needs no C++ compiler. Raises ConfigError."""
    from qcompile.lowering.inductor import choose_inner

    if inner not in INNERS:
        raise ConfigError(f"inner must be one of {', '.join(INNERS)}; got {inner!r}")
    compilations = Compilations(choose_inner(inner))
    model.compile(backend=compilations, dynamic=False)
    return compilations


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Calls inside compile what they meet; beyond Dynamo's limit they fail instead of running uncompiled."""
    limits: dict[str, Any] = {
        "recompile_limit": MOST_GRAPHS,
        "accumulated_recompile_limit": 4 * MOST_GRAPHS,
        "fail_on_recompile_limit_hit": True,
    }
    with torch.no_grad(), torch._dynamo.config.patch(limits):
        yield


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Calls inside may not compile: a shape that was never met is an error of torch, at once.

    Of all that Dynamo would check, for every module and parameter at every call, it checks what the graphs differ in
    (its `skip_guard_eval_unsafe`). So nothing else may have changed since they were compiled, and there must be
    several. A decode step of 32 layers so takes 1.5 ms less.
    """
    with compiling(), torch.compiler.set_stance("fail_on_recompile", skip_guard_eval_unsafe=True):
        yield
