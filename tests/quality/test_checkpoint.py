"""Figures of an evaluation, on models whose answers are known."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import IDS, llama, logits, quantized

from qcompile.errors import ConfigError
from qcompile.quality.checkpoint import evaluate_checkpoint, weight_bytes


class Fixed(torch.nn.Module):
    """Gives the same logits to every token."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = torch.nn.Parameter(torch.tensor(values), requires_grad=False)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.values.expand(*input_ids.shape, -1))


def test_known_answers() -> None:
    ids = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    p, q = Fixed(0.0, math.log(3)), Fixed(0.0, 0.0)  # ¼, ¾ against ½, ½
    found = evaluate_checkpoint(q, ids, batch=2, against=p)
    assert found.tokens == 6
    assert found.nll == pytest.approx(math.log(2))
    assert found.perplexity == pytest.approx(2)
    assert found.against is not None
    assert found.against.kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-5)
    assert found.against.nll == pytest.approx(-(5 * math.log(0.75) + math.log(0.25)) / 6, rel=1e-5)
    assert found.against.top1 == 0


def test_a_model_of_other_tokens_is_no_measure() -> None:
    other = llama()
    other.resize_token_embeddings(80)
    with pytest.raises(ConfigError, match="against must be the float model .*; it knows 80 tokens, the other 64$"):
        evaluate_checkpoint(llama(), IDS, against=other)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_figures_that_are_not_finite_are_null_in_json() -> None:
    found = evaluate_checkpoint(Fixed(math.nan, 0.0), torch.tensor([[0, 1, 1, 0]]), against=Fixed(0.0, 0.0))
    values = json.loads(found.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (values["nll"], values["perplexity"], values["against"]["kl"]) == (None, None, None)
    assert values["against"]["nll"] == pytest.approx(math.log(2))


def test_a_model_against_itself() -> None:
    model = llama()
    calls = []
    found = evaluate_checkpoint(model, IDS, batch=1, against=model, advance=lambda: calls.append(1))
    assert found.against is not None
    assert (found.against.kl, found.against.top1) == (0, 1)
    assert found.against.nll == found.nll
    assert len(calls) == 2
    log_q = logits(model)[:, :-1].log_softmax(-1)
    assert found.nll == pytest.approx(float(-log_q.gather(2, IDS[:, 1:, None]).mean()), rel=1e-6)


def test_what_runs_may_be_another_call() -> None:
    model = quantized()
    fast = torch.compile(model, backend="w8a8", options={"inner": "eager"})
    found = evaluate_checkpoint(model, IDS, batch=2, forward=fast, against=llama())
    assert found.nll == pytest.approx(evaluate_checkpoint(model, IDS, batch=2).nll, abs=1e-5)
    values = json.loads(found.to_json())
    assert values["against"]["sqnr"]
    assert values["tokens_per_second"] > 0
    assert values["peak_bytes"] > values["weight_bytes"] > 0
    assert values["perplexity"] == found.perplexity


def test_shared_memory_counts_once() -> None:
    model = llama()
    assert weight_bytes(model) == sum(parameter.nbytes for parameter in model.parameters())
