"""What a transformers model can take: how many positions, which tokens, a cache by which name, or none."""

import inspect
from collections.abc import Callable
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")


def positions_of(model: Any) -> int | None:
    """How many positions the model's config allows, if it says so."""
    config = model.config.get_text_config()
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def vocabulary_of(model: Any) -> int | None:
    """How many tokens the model has embeddings for, if its inputs are tokens."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return None if weight is None else int(weight.shape[0])


def cache_name(function: Callable[..., Any]) -> str:
    """What a function of a model calls the KV cache: `cache` from transformers 5.24 on, `past_key_values` before.

    Outputs have it by the name that the model's forward takes.
    """
    parameters = inspect.signature(function).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[-1])


def without_cache(model: Any) -> dict[str, Any]:
    """The keyword that keeps a model's forward from returning a KV cache, if it takes one."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    config = getattr(model, "config", None)
    configs = (config, getattr(config, "get_text_config", lambda: None)())
    known = takes_any and any(hasattr(each, "use_cache") for each in configs)
    return {"use_cache": False} if "use_cache" in parameters or known else {}
