"""What a transformers model can take: how many positions, which tokens."""

from typing import Any


def positions_of(model: Any) -> int | None:
    """How many positions the model's config allows, if it says so."""
    config = model.config.get_text_config()
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def vocabulary_of(model: Any) -> int | None:
    """How many tokens the model has embeddings for, if its inputs are tokens."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return None if weight is None else int(weight.shape[0])
