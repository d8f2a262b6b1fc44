"""What is padded on its way to the model, and cut on its way back."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from qcompile.generation.padded_cache import PaddedCache

CONFIG = LlamaConfig(num_hidden_layers=1, hidden_size=4, num_attention_heads=1, sliding_window=3)


@pytest.fixture
def cache() -> PaddedCache:
    """Two rows and three tokens, padded by one row and two tokens."""
    made = PaddedCache(CONFIG, 8)
    made.left, made.below = 2, 1
    made.update(torch.arange(60.0).reshape(3, 1, 5, 4), torch.arange(60.0).reshape(3, 1, 5, 4), 0)
    return made


def test_inputs(cache: PaddedCache) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    positions = {"position_ids": torch.tensor([[0, 1, 2]]), "attention_mask": None, "token_type_ids": ids}
    padded, keywords = cache.padded_inputs(ids, {**positions, "other": 1})
    assert padded.tolist() == [[5, 5, 5, 6, 7], [8, 8, 8, 9, 10], [8, 8, 8, 9, 10]]
    assert keywords["attention_mask"].tolist() == [[0, 0, 1, 1, 1]] * 3
    assert keywords["position_ids"].tolist() == [[0, 0, 0, 1, 2]] * 3
    assert torch.equal(keywords["token_type_ids"], padded)
    assert keywords["other"] == 1
    three = cache.padded(torch.arange(18).reshape(3, 2, 3))  # as of models with several kinds of positions
    assert three.shape == (3, 3, 5)


@pytest.mark.parametrize(("queries", "kept"), [(5, 3), (1, 1)])
def test_outputs(cache: PaddedCache, queries: int, kept: int) -> None:
    outputs: Any = CausalLMOutputWithPast(
        logits=torch.zeros(3, 1, 9), hidden_states=(torch.zeros(3, queries, 4),),
        attentions=(torch.zeros(3, 1, queries, 8),),
    )  # fmt: skip
    cache.cut(outputs)
    assert outputs.logits.shape == (2, 1, 9)
    assert outputs.hidden_states[0].shape == (2, kept, 4)
    assert outputs.attentions[0].shape == (2, 1, kept, 3)


def test_beams_leave_rows_of_padding_alone(cache: PaddedCache) -> None:
    before = cache.layers[0].keys.clone()
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.layers[0].keys, before[[1, 1, 2]])


def test_without_padding(cache: PaddedCache) -> None:
    plain = cache.without_padding(LlamaConfig(num_hidden_layers=1, hidden_size=4, num_attention_heads=1))
    assert type(plain) is DynamicCache
    assert torch.equal(plain.layers[0].keys, cache.layers[0].keys[:2, :, 2:5])
    assert torch.equal(plain.layers[0].values, cache.layers[0].values[:2, :, 2:5])
