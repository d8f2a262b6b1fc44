"""transformers' own `generate`, with prefill and decode compiled, in a bounded number of shapes.

The static cache has one length, prompts are padded to one of a few. So a process compiles, for each number of rows, one
graph per padded length and one for decoding. Three methods that transformers calls on the model are replaced: the one
that makes the cache, and those before and after the model itself, between which everything is padded. Whatever else
looks at tokens or scores (criteria, processors, streamers) sees those that transformers shows it without us.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import ConfigError
from qcompile.generation.compiled_model import compile_in_place, compiling
from qcompile.generation.padded_cache import PaddedCache
from qcompile.generation.slots import attention_windows, buckets
from qcompile.model_limits import CACHE_NAMES, cache_name, positions_of


class CompiledGeneration:
    """A model whose `generate` is compiled, in place. length: most tokens of prompt and completion together.
    `compilations.count` says how many graphs there are. One call at a time."""

    def __init__(self, model: Any, length: int, inner: str = "auto") -> None:
        """Raises ConfigError for layers that no static cache holds."""
        attention_windows(model)
        self.model, self.length = model, length
        most = positions_of(model)
        self._or_more = "" if most is not None and length >= most else ", or compile for a larger max_length"
        self._cache_name = cache_name(model.prepare_inputs_for_generation)
        # At least one token of padding: transformers drops a mask that hides nothing, and the graph would be another.
        self._lengths = buckets(length + 1)
        gaps = (longer - shorter for longer, shorter in itertools.pairwise((*self._lengths, 0)))
        self._positions = length + max(gaps)
        self._rows: list[int] = []
        self._must_fit = False
        self.compilations = compile_in_place(model, inner)
        for name, replacement in (
            ("generate", self._call),
            ("_prepare_cache_for_generation", self._prepare_cache),
            ("prepare_inputs_for_generation", self._prepare_inputs),
            ("_update_model_kwargs_for_generation", self._take_outputs),
        ):
            original = getattr(model, name)
            # Its signature stays: transformers reads there what a model takes.
            setattr(model, name, functools.wraps(original)(functools.partial(replacement, original)))

    def warm_up(
        self, rows: Sequence[int] = (1,), told: Callable[[int, int, str], None] = lambda done, total, what: None
    ) -> None:
        """Compile all shapes for these numbers of rows, longest first. Batches are filled up to them from then on.
        told: progress."""
        prompts = [min(size - 1, self.length - 1) for size in self._lengths]
        steps = [(count, size) for count in rows for size in dict.fromkeys(prompts)]
        for done, (count, size) in enumerate(steps):
            told(done, len(steps), f"{count} × {size}")
            ids = torch.ones(count, size, dtype=torch.long, device=self.model.device)
            new = min(2, self.length - size)
            self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new)
        self._rows = sorted({*self._rows, *rows})
        told(len(steps), len(steps), "ready")

    def _call(self, original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """A length asked for by keyword must fit, one from a generation config gives way. Raises ConfigError."""
        self._must_fit = any(keywords.get(name) is not None for name in ("max_new_tokens", "max_length"))
        with compiling():
            found = original(*arguments, **keywords)
        for name in CACHE_NAMES:
            cache = getattr(found, name, None)
            if isinstance(cache, PaddedCache):
                setattr(found, name, cache.without_padding(self.model.config))
        return found

    def _prepare_cache(
        self, original: Callable[..., Any], config: Any, inputs: dict[str, Any], mode: Any, *sizes: Any
    ) -> None:
        """inputs: what goes to the model; the cache is put there."""
        if not _can_pad(config, inputs, mode):
            original(config, inputs, mode, *sizes)
            return
        if config.max_length > self.length and self._must_fit:
            new = config.max_new_tokens
            prompt = f"{config.max_length - (new or 0)} of prompt and {new} new"
            raise ConfigError(
                f"prompt and completion must have at most {self.length} tokens; got "
                f"{prompt if new else f'max_length={config.max_length}'}; shorten them{self._or_more}"
            )
        config.max_length = min(config.max_length, self.length)
        config.disable_compile = True  # it is compiled already
        inputs[self._cache_name] = PaddedCache(self.model.config, self._positions)

    def _prepare_inputs(self, original: Callable[..., Any], input_ids: Tensor, *rest: Any, **keywords: Any) -> Any:
        """input_ids [B, T]: the prompt, or all tokens so far."""
        cache = keywords.get(self._cache_name)
        if not isinstance(cache, PaddedCache):
            return original(input_ids, *rest, **keywords)
        if keywords.get("is_first_iteration"):
            rows, tokens = input_ids.shape
            if not 1 <= tokens < self.length:
                raise ConfigError(f"generate needs prompts of 1…{self.length - 1} tokens; got {tokens}; shorten them")
            cache.left = min(length for length in self._lengths if length > tokens) - tokens
            cache.below = next((count - rows for count in self._rows if count >= rows), 0)
            keywords["next_sequence_length"] = None
        keywords.pop("tokenizer", None)  # of stop strings: transformers hands it on, and the graph would be another
        input_ids, keywords = cache.padded_inputs(input_ids, keywords)
        return original(input_ids, *rest, **keywords)

    def _take_outputs(
        self, original: Callable[..., Any], outputs: Any, inputs: dict[str, Any], *rest: Any, **keywords: Any
    ) -> Any:
        cache = inputs.get(self._cache_name)
        if isinstance(cache, PaddedCache):
            cache.cut(outputs)
        return original(outputs, inputs, *rest, **keywords)


def _can_pad(config: Any, inputs: dict[str, Any], mode: Any) -> bool:
    """Whether a call can have our cache. The rest is compiled for every shape that comes: embeddings, caches of the
    caller's own, assistants, chunks of a prompt, and caches that are no plain tensors."""
    return (
        all(inputs.get(name) is None for name in ("inputs_embeds", *CACHE_NAMES))
        and config.use_cache is not False
        and not config.is_assistant
        and mode.value != "assisted_generation"
        and config.prefill_chunk_size is None
        and config.cache_implementation in (None, "dynamic", "static", "hybrid", "sliding_window")
    )
