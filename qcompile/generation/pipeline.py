"""A transformers text-generation pipeline around a quantized model, compiled."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qcompile.errors import ConfigError

LENGTH = 2048  # tokens of prompt and completion by default: a cache of everything a model could read rarely fits


def pipeline(
    model: str | Path | Any,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    batch_size: int = 1,
    inner: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    told: Callable[[int, int, str], None] | None = None,
) -> Any:
    """A transformers `TextGenerationPipeline` of a quantized folder, whose generate is compiled before it returns.

    model: a folder, or a quantized model together with its tokenizer. max_length: most tokens of prompt and completion
    (default 2048, or the model's positions). batch_size: as of transformers; graphs are compiled for it and for 1, and
    smaller batches are filled up to it. told: progress of compiling (done, total, what).
    Raises CheckpointError, ConfigError.
    """
    import transformers

    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1; got {batch_size}")
    model, tokenizer = load_generation(
        model, tokenizer, max_length=max_length, inner=inner, device=device, trust_remote_code=trust_remote_code
    )
    made = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=batch_size)
    model.compiled_generation.warm_up(rows_of(batch_size), *([told] if told else []))
    return made


def rows_of(batch_size: int) -> Sequence[int]:
    """Numbers of rows to compile for, longest first."""
    return tuple(dict.fromkeys((batch_size, 1)))


def load_generation(
    model: str | Path | Any,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    inner: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model with `compiled_generation` in place, and its tokenizer, padding on the left. Raises ConfigError."""
    from qcompile.checkpoint.loading import from_pretrained, load_tokenizer
    from qcompile.generation.generate import CompiledGeneration
    from qcompile.model_limits import positions_of

    if isinstance(model, str | Path):
        tokenizer = tokenizer or load_tokenizer(model, trust_remote_code=trust_remote_code)
        model = from_pretrained(model, device=device, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise ConfigError("a pipeline needs a tokenizer; pass the one that belongs to the model")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    length = checked_length(max_length, positions_of(model))
    model.compiled_generation = CompiledGeneration(model, length, inner)
    return model, tokenizer


def checked_length(wanted: int | None, positions: int | None) -> int:
    """Most tokens of a sequence. Raises ConfigError."""
    if wanted is None:
        return min(LENGTH, positions or LENGTH)
    if wanted < 2 or (positions is not None and wanted > positions):
        raise ConfigError(f"max-length must be 2…{positions or 'any'}, the model's positions; got {wanted}")
    return wanted
