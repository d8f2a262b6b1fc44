"""Positions and tokens that a model takes, from its config and its embeddings, and how it calls its cache."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from qcompile.errors import ConfigError
from qcompile.model_limits import cache_name, check_same_tokens, ends_of, positions_of, vocabulary_of, without_cache


def model(embeddings: nn.Module | None = None, **config: Any) -> Any:
    text = SimpleNamespace(**config)
    return SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: text), get_input_embeddings=lambda: embeddings,
        named_modules=list,
    )  # fmt: skip


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


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}


@pytest.mark.parametrize(("architecture", "padding"), [
    ("Roberta", 1), ("Camembert", 1), ("MPNet", 1), ("Bert", 0), ("Electra", 0), ("OPT", 0),
])  # fmt: skip
def test_every_position_but_those_of_padding_is_one(architecture: str, padding: int) -> None:
    config = getattr(transformers, f"{architecture}Config")(**SMALL, max_position_embeddings=20)
    encoder = getattr(transformers, f"{architecture}Model")(config).eval()
    most = positions_of(encoder)
    assert most == 20 - (padding + 1 if padding else 0)
    ids = torch.arange(5, 5 + most)[None]
    encoder(input_ids=ids)
    with pytest.raises((IndexError, RuntimeError)):
        encoder(input_ids=torch.arange(5, 6 + most)[None])


def test_vocabulary() -> None:
    assert vocabulary_of(model(nn.Embedding(48, 8))) == 48
    assert vocabulary_of(model()) is None


def test_the_tokens_that_end_a_text_are_of_both() -> None:
    reader = SimpleNamespace(eos_token_id=7)
    for own, ends in ((None, {7}), (3, {3, 7}), ([3, 4], {3, 4, 7}), ([], {7})):
        assert ends_of(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own)), reader) == ends
    assert ends_of(SimpleNamespace(generation_config=None), SimpleNamespace(eos_token_id=None)) == set()
    for broken in ("</s>", ["</s>"], 2.0, True):
        with pytest.raises(ConfigError, match="must be token numbers; got .*; mend the file"):
            ends_of(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=broken)), reader)


def test_a_call_without_a_cache() -> None:
    """By the parameter, or the config of a model that hands on whatever it is given."""
    found, asks = model(use_cache=True), {"use_cache": False}
    found.forward = lambda input_ids: None
    assert without_cache(found) == {}
    found.forward = lambda input_ids, **keywords: None
    assert without_cache(found) == asks
    found.config = SimpleNamespace(use_cache=True)
    assert without_cache(found) == asks
    found.config = SimpleNamespace()
    assert without_cache(found) == {}
    found.forward = lambda input_ids, use_cache=True: None
    assert without_cache(found) == asks


def test_the_name_of_the_cache_is_that_of_the_function() -> None:
    """transformers 5.24 renamed it."""
    assert cache_name(lambda input_ids, cache=None: None) == "cache"
    assert cache_name(lambda input_ids, past_key_values=None: None) == "past_key_values"
    assert cache_name(lambda **keywords: None) == "past_key_values"


def test_models_of_one_vocabulary() -> None:
    one, other = model(nn.Embedding(8, 2)), model(nn.Embedding(9, 2))
    check_same_tokens(one, one)
    check_same_tokens(one, nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="it knows 9 tokens, the other 8"):
        check_same_tokens(one, other)
