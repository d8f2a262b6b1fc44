"""What a transformers model can take: how many positions, which tokens, a cache by which name or none; what ends it."""

import inspect
from collections.abc import Callable
from typing import Any

from qcompile.errors import ConfigError

CACHE_NAMES = ("cache", "past_key_values")


def positions_of(model: Any) -> int | None:
    """How many positions the model's config allows, if it says so."""
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    found = next((value for value in named if isinstance(value, int) and value > 0), None)
    return None if found is None else found - _positions_of_padding(model)


def _positions_of_padding(model: Any) -> int:
    """Positions that a config counts and no token gets: RoBERTa and its like number tokens from the one after padding,
    in embeddings that know of padding."""
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return int(padding) + 1
    return 0


def vocabulary_of(model: Any) -> int | None:
    """How many tokens the model has embeddings for, if its inputs are tokens."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return None if weight is None else int(weight.shape[0])


def ends_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: the generation config's, and the tokenizer's. Raises ConfigError."""
    found = getattr(model.generation_config, "eos_token_id", None)
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(end) is int for end in ends):
        raise ConfigError(f"eos_token_id of generation_config.json must be token numbers; got {found!r}; mend the file")
    return frozenset(ends + ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]))


def check_same_tokens(model: Any, against: Any) -> None:
    """Raises ConfigError if one model cannot be compared with another on tokens, having a vocabulary of its own."""
    if not all(hasattr(one, "get_input_embeddings") for one in (model, against)):
        return  # no models of transformers: the caller knows
    ours, theirs = vocabulary_of(model), vocabulary_of(against)
    if ours != theirs:
        raise ConfigError(
            f"against must be the float model that the other was made from; it knows {theirs} tokens, the other {ours}"
        )


def without_cache(model: Any) -> dict[str, bool]:
    """What asks a model for a call without a KV cache, where it can be asked."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    asks = "use_cache" in parameters or (takes_any and (hasattr(config, "use_cache") or hasattr(text, "use_cache")))
    return {"use_cache": False} if asks else {}


def cache_name(function: Callable[..., Any]) -> str:
    """What a function of a model calls the KV cache: `cache` from transformers 5.24 on, `past_key_values` before.

    Outputs have it by the name that the model's forward takes.
    """
    parameters = inspect.signature(function).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[-1])
