"""Positions and tokens that a model takes, from its config and its embeddings, and how it calls its cache."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from qcompile.model_limits import cache_name, positions_of, vocabulary_of, without_cache


def model(embeddings: nn.Module | None = None, **config: Any) -> Any:
    text = SimpleNamespace(**config)
    return SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: text), get_input_embeddings=lambda: embeddings
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 128}, 128), ({"n_positions": 64}, 64), ({"max_seq_len": 32}, 32), ({}, None),
        ({"max_position_embeddings": None, "n_positions": 16}, 16), ({"max_position_embeddings": -1}, None),
        ({"max_position_embeddings": "many"}, None),
    ],
)  # fmt: skip
def test_positions(config: dict[str, Any], expected: int | None) -> None:
    assert positions_of(model(**config)) == expected


def test_vocabulary() -> None:
    assert vocabulary_of(model(nn.Embedding(48, 8))) == 48
    assert vocabulary_of(model()) is None


def test_the_name_of_the_cache_is_that_of_the_function() -> None:
    """transformers 5.24 renamed it."""
    assert cache_name(lambda input_ids, cache=None: None) == "cache"
    assert cache_name(lambda input_ids, past_key_values=None: None) == "past_key_values"
    assert cache_name(lambda **keywords: None) == "past_key_values"


def test_only_what_takes_use_cache_is_told_to_do_without() -> None:
    told = {"use_cache": False}
    config = SimpleNamespace(use_cache=True)
    text = SimpleNamespace(get_text_config=lambda: config)
    assert without_cache(SimpleNamespace(forward=lambda ids, use_cache=None: None)) == told
    assert without_cache(SimpleNamespace(forward=lambda ids, **keywords: None, config=config)) == told
    assert without_cache(SimpleNamespace(forward=lambda ids, **keywords: None, config=text)) == told
    assert without_cache(SimpleNamespace(forward=lambda ids, **keywords: None)) == {}
    assert without_cache(SimpleNamespace(forward=lambda ids: None, config=config)) == {}
