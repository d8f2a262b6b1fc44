"""What a case of a transfer rule is, and the parts its body may use."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from graphs import captured
from probe import Body, randomized
from torch import Tensor, nn

from qcompile.captured import Captured

K = 16  # channels
HALF = K // 2
PINNED = "nothing before its input can take a scale"  # the pin lies on what an op read, its result is a plain value
COARSE = "tied so coarsely"


@dataclasses.dataclass(frozen=True)
class Case:
    """A forward over norm → … → linears; which linears fold, and why each other one does not.

    rule: the rule under test; the captured graph must contain an op that it handles.
    """

    rule: Callable[..., Any]
    body: Callable[..., Any]
    folds: set[str] = dataclasses.field(default_factory=lambda: {"fc"})
    unfolded: dict[str, str] = dataclasses.field(default_factory=dict)
    dynamic: bool = False


CASES: dict[str, Case] = {}


def case(rule: Callable[..., Any], folds: str = "fc", dynamic: bool = False, **unfolded: str) -> Any:
    """Register a body. `folds` lists linears by name, `unfolded` gives the others with part of the reason."""

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        CASES[body.__name__] = Case(rule, body, set(folds.split()), unfolded, dynamic)
        return body

    return register


def model(body: Callable[..., Any]) -> Body:
    """Everything a body may use. Parts that it does not use are not captured."""
    return Body(
        body,
        norm=nn.LayerNorm(K),
        norm2=nn.LayerNorm(K),
        up=nn.Linear(K, K),
        gate=nn.Linear(K, K),
        q=nn.Linear(K, K),
        k=nn.Linear(K, K),
        qkv=nn.Linear(K, 3 * K),
        fc=nn.Linear(K, 5),
        fc2=nn.Linear(K, 5),
        wide=nn.Linear(2 * K, 5),
        low=nn.Linear(HALF, 5),
        high=nn.Linear(HALF, 5),
        tokens=nn.Linear(3, 5),
        vector=nn.Parameter(torch.empty(K)),
        scalar=nn.Parameter(torch.empty(())),
        matrix=nn.Parameter(torch.randn(K, K)),
        prefix=nn.Parameter(torch.randn(2, 2, K)),
        bank=nn.Parameter(torch.randn(K, 2 * K)),
    )


def example() -> Tensor:
    return torch.randn(2, 3, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@functools.cache
def capture(name: str) -> Captured:
    case = CASES[name]
    return captured(randomized(model(case.body)), example(), dynamic=case.dynamic)
