"""Which linears make a choice."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import captured
from probe import Body
from torch import Tensor, nn

from qcompile.pass_pipeline import Pipeline
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears, info_of, linears


def router(scores: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A body that mixes two experts by the scores of the linear `gate`."""

    def body(m: Any, x: Tensor) -> Tensor:
        weights, chosen = scores(m, m.gate(x)).topk(2, dim=-1)
        return m.fc(x) * weights.sum(-1, keepdim=True) + chosen.sum(-1, keepdim=True)

    return body


CHOOSING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "logits": router(lambda m, y: y),
    "softmax in float32": router(lambda m, y: torch.softmax(y, -1, dtype=torch.float32)),
    "sigmoid and a correction": router(lambda m, y: torch.sigmoid(y) + m.correction),
    "groups": router(lambda m, y: y.view(2, 5, 2, 2).topk(2, dim=-1).values.sum(-1)),
    "argmax": lambda m, x: m.fc(x) * (m.gate(x).argmax(-1, keepdim=True) == 1),
    "max": lambda m, x: m.fc(x) * m.gate(x).max(-1, keepdim=True).indices,
    "sort": lambda m, x: m.fc(x) * m.gate(x).flatten(0, 1).sort(dim=-1).indices[..., :1].view(2, 5, 1),
}
NOT_CHOOSING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a gate of a shared expert": lambda m, x: m.fc(x) * torch.sigmoid(m.gate(x)).sum(-1, keepdim=True),
    "mixed with another activation": lambda m, x: m.fc(x) + (m.gate(x) * x[..., :4]).topk(1).indices,
    "after another linear": lambda m, x: m.back(m.gate(x)).topk(1).indices + m.gate(x).sum(-1, keepdim=True),
    "a sum over channels": lambda m, x: m.fc(x) + (m.gate(x).sum(-1)).topk(1).indices[..., None],
}


def left_in_float(body: Callable[[Any, Tensor], Tensor], **options: Any) -> dict[str, str]:
    torch.manual_seed(0)
    parts: dict[str, Any] = {"gate": nn.Linear(16, 4), "fc": nn.Linear(16, 16), "back": nn.Linear(4, 6)}
    model = Body(body, **parts, correction=nn.Parameter(torch.randn(4)))
    gm, _ = Pipeline((Canonicalize(), FindLinears())).run(captured(model, torch.randn(2, 5, 16), **options).graph)
    return {info_of(node).name: info_of(node).reason for node in linears(gm) if not info_of(node).quantize}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CHOOSING)
def test_a_router_stays_in_float(name: str, dynamic: bool) -> None:
    left = left_in_float(CHOOSING[name], dynamic=dynamic)
    assert list(left) == ["gate"]
    assert "largest outputs are picked" in left["gate"]


@pytest.mark.parametrize("name", NOT_CHOOSING)
def test_other_linears_are_quantized(name: str) -> None:
    left = left_in_float(NOT_CHOOSING[name])
    assert "gate" not in left


def test_the_linear_in_between_chooses() -> None:
    assert list(left_in_float(NOT_CHOOSING["after another linear"])) == ["back"]
