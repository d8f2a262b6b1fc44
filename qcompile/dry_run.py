"""A dry run of a model whose linears only seem to hold 8-bit weights: what its code makes of that, before any is lost.

Code may look at a weight's dtype. PEFT casts what a LoRA matrix reads to the dtype of that matrix, T5 what `wo` reads
unless that is int8: with 8-bit weights the linear would read 8-bit numbers. The stand-ins compute what the linears do,
so what the model returns must not change either.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qcompile.errors import ConfigError
from qcompile.quantized_linear import is_wide
from qcompile.validate import relative_error

Expected = list[Tensor] | None
NEARLY_EQUAL = 1e-2  # relative; what code does about a dtype is larger


def must_stay_float(
    model: nn.Module, linears: Collection[nn.Module], dtype: torch.dtype, call: Mapping[str, Any]
) -> set[nn.Module]:
    """Those of the linears that cannot have weights of an 8-bit dtype: they would read numbers cast to it, or the model
    refuses to run. Its weights stay what they are.

    linears: nn.Linears and Conv1Ds of the model, weights [N, K] and [K, N]. dtype: int8 or fp8. call: keywords;
    the model runs three times on them, and more often if some linear is found. Raises ConfigError if it does not run
    and nothing says which linear that is about.
    """
    found: set[nn.Module] = set()
    if not linears:
        return found
    expected: Expected = _outputs(model, call)
    if not _same(_outputs(model, call), expected):
        expected = None  # it changes from call to call by itself
    while more := _found_in_one_run(model, [m for m in linears if m not in found], dtype, call, expected):
        found |= more
    return found


def _found_in_one_run(
    model: nn.Module, linears: list[nn.Module], dtype: torch.dtype, call: Mapping[str, Any], expected: Expected
) -> set[nn.Module]:
    """One run, with all of them standing in: which ones read something else than they should. If none does and the
    model returns something else than expected, more runs tell which ones that depends on."""
    watched = _Watched()
    try:
        outputs = _outputs_with(model, linears, dtype, call, watched)
    except Exception as error:  # whatever its code, or torch, makes of a dtype that it did not expect
        if not (suspects := watched.narrow | watched.looked_at or watched.other):
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"{type(model).__name__} must run with 8-bit weights in its linears; then it raises: {reason}"
            ) from None
        return suspects
    if watched.narrow or _same(outputs, expected):
        return watched.narrow

    def matter(some: list[nn.Module]) -> bool:
        try:
            return not _same(_outputs_with(model, some, dtype, call, _Watched()), expected)
        except Exception:  # as above
            return True

    return _smallest(linears, matter)


def _smallest(linears: list[nn.Module], matter: Callable[[list[nn.Module]], bool]) -> set[nn.Module]:
    """Of linears that matter together, those that matter in ever smaller halves."""
    middle = len(linears) // 2
    halves = [half for half in (linears[:middle], linears[middle:]) if half and len(half) < len(linears)]
    found: set[nn.Module] = set().union(*(_smallest(half, matter) for half in halves if matter(half)))
    return found or {*linears}


def _outputs_with(
    model: nn.Module, linears: list[nn.Module], dtype: torch.dtype, call: Mapping[str, Any], watched: "_Watched"
) -> list[Tensor]:
    with contextlib.ExitStack() as stack:
        for module in linears:
            stack.enter_context(_standing_in(module, dtype, watched))
        return _outputs(model, call)


def _outputs(model: nn.Module, call: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an eager call returns, under the same random numbers each time."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), torch.random.fork_rng():
        return [value for value in tree_leaves(model(**call)) if isinstance(value, Tensor)]


def _same(outputs: list[Tensor], expected: Expected) -> bool:
    """Whether outputs are the expected ones, if any are, but for what GPUs add up in another order. Integers may be
    choices."""
    if expected is None:
        return True
    if [(y.dtype, y.shape) for y in outputs] != [(y.dtype, y.shape) for y in expected]:
        return False
    pairs = [(y, z) for y, z in zip(outputs, expected, strict=True) if z.is_floating_point()]
    return all(relative_error(y, z) <= NEARLY_EQUAL for y, z in pairs)


class _Watched:
    """Linears that read 8-bit numbers, those whose weight was looked at from outside, and the first one that read
    another dtype than that of its float weight."""

    def __init__(self) -> None:
        self.narrow: set[nn.Module] = set()
        self.looked_at: set[nn.Module] = set()
        self.other: set[nn.Module] = set()


@contextlib.contextmanager
def _standing_in(module: nn.Module, dtype: torch.dtype, watched: _Watched) -> Iterator[None]:
    """The module, which computes what it did, looks like a QuantizedLinear inside the block."""
    kind, parameters, weight = type(module), module._parameters, module.get_parameter("weight")
    # One element of memory; and a scale, since code may look for the first parameter that is a float.
    shown = nn.Parameter(torch.empty(1, dtype=dtype, device=weight.device).expand(weight.shape), requires_grad=False)
    scale = nn.Parameter(torch.ones(1, 1, device=weight.device), requires_grad=False)

    class StandIn(nn.Module):
        @property
        def weight(self) -> Tensor:
            watched.looked_at.add(module)
            return shown

        def forward(self, x: Tensor) -> Tensor:
            if not is_wide(x):
                watched.narrow.add(module)
                x = x.to(weight.dtype)
            elif x.dtype != weight.dtype and not watched.other:
                watched.other.add(module)
            with _as(module, kind, parameters):
                y: Tensor = kind.forward(module, x.to(weight.dtype))
            return y.to(x.dtype)

    # In the order of QuantizedLinear's.
    with _as(module, StandIn, {"weight": shown, "weight_scale": scale} | {**parameters, "weight": shown}):
        yield


@contextlib.contextmanager
def _as(module: nn.Module, kind: type[nn.Module], parameters: dict[str, Any]) -> Iterator[None]:
    before = module.__class__, module._parameters
    module.__class__, module._parameters = kind, parameters
    try:
        yield
    finally:
        module.__class__, module._parameters = before
