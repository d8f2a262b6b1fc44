"""transformers' own `generate`, with prefill and decode compiled, in a bounded number of shapes.

Prompts are padded on the left to one of a few lengths, and the static cache has one length, with room for the padding.
So a process compiles, for each number of rows, one graph per padded length and one for decoding. Masks hide the padding
from the model.
"""

import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import ConfigError
from qcompile.generation.compiled_model import compile_in_place, compiling
from qcompile.generation.slots import attention_windows, buckets
from qcompile.model_limits import CACHE_NAMES, cache_name


class CompiledGeneration:
    """A model whose `generate` is compiled, in place. length: most tokens of prompt and completion together.
    `compilations.count` says how many graphs there are."""

    def __init__(self, model: Any, length: int, inner: str = "auto") -> None:
        """Raises ConfigError for layers that no static cache holds."""
        attention_windows(model)
        self._model, self.length = model, length
        self._generate = model.generate
        self._cache_name = cache_name(model.prepare_inputs_for_generation)
        # At least one token of padding: transformers drops a mask that hides nothing, and the graph would be another.
        self._lengths = buckets(length + 1)
        gaps = (longer - shorter for longer, shorter in itertools.pairwise((*self._lengths, 0)))
        self._positions = length + max(gaps)
        self._rows: list[int] = []
        self.compilations = compile_in_place(model, inner)
        model.generate = types.MethodType(lambda _, *args, **kwargs: self.generate(*args, **kwargs), model)

    def warm_up(
        self, rows: Sequence[int] = (1,), told: Callable[[int, int, str], None] = lambda done, total, what: None
    ) -> None:
        """Compile all shapes for these numbers of rows, longest first. Batches are filled up to them from then on.
        told: progress."""
        prompts = [min(size - 1, self.length - 1) for size in self._lengths]
        steps = [(count, size) for count in rows for size in dict.fromkeys(prompts)]
        for done, (count, size) in enumerate(steps):
            told(done, len(steps), f"{count} × {size}")
            ids = torch.ones(count, size, dtype=torch.long, device=self._model.device)
            new = min(2, self.length - size)
            self.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new)
        self._rows = sorted({*self._rows, *rows})
        told(len(steps), len(steps), "ready")

    def generate(self, inputs: Tensor | None = None, *, input_ids: Tensor | None = None, **keywords: Any) -> Any:
        """As model.generate; input_ids [B, T]. Raises ConfigError if the prompt leaves no room."""
        ids = input_ids if inputs is None else inputs
        if ids is None or ids.dim() != 2 or not ids.shape[1]:
            raise ConfigError("generate needs input_ids [rows, tokens] with at least one token; give a prompt")
        if not keywords.keys().isdisjoint(CACHE_NAMES) or keywords.get("assistant_model") is not None:
            with compiling():
                return self._generate(input_ids=ids, **keywords)
        new = self._new_tokens(ids.shape[1], keywords)
        mask = keywords.pop("attention_mask", None)
        mask = torch.ones_like(ids) if mask is None else mask
        size = min(length for length in self._lengths if length > ids.shape[1])
        added = size - ids.shape[1]
        extra = self._missing_rows(ids.shape[0], keywords)
        _take_stop_strings(keywords)
        if keywords.get("streamer") is not None:
            keywords["streamer"] = _Unpadded(keywords["streamer"], added)
        with compiling():
            found = self._generate(
                input_ids=_filled(ids, added, extra, None), attention_mask=_filled(mask, added, extra, 0),
                max_new_tokens=new, disable_compile=True, **{self._cache_name: self._cache()}, **keywords,
            )  # fmt: skip
        if isinstance(found, Tensor):
            return found[: len(found) - extra, added:]
        found.sequences = found.sequences[:, added:]
        return found

    def _missing_rows(self, rows: int, keywords: dict[str, Any]) -> int:
        """How many rows to add to reach a number that is compiled; none where rows are more than prompts."""
        config = keywords.get("generation_config") or self._model.generation_config
        many = (keywords.get(key) or getattr(config, key, None) for key in ("num_beams", "num_return_sequences"))
        whole = keywords.get("return_dict_in_generate") or getattr(config, "return_dict_in_generate", None)
        if whole or keywords.get("streamer") is not None or any((value or 1) > 1 for value in many):
            return 0
        return next((count - rows for count in self._rows if count >= rows), 0)

    def _new_tokens(self, prompt: int, keywords: dict[str, Any]) -> int:
        """How many tokens to make; takes what depends on the padded prompt's length out of `keywords`."""
        config = keywords.get("generation_config") or self._model.generation_config
        room = self.length - prompt
        new, total = keywords.pop("max_new_tokens", None), keywords.pop("max_length", None)
        least = keywords.pop("min_length", None) or getattr(config, "min_length", None)
        if least:
            keywords.setdefault("min_new_tokens", max(0, least - prompt))
        if new is None and total is not None:
            new = total - prompt
        if new is None:  # a default of the model gives way
            new = getattr(config, "max_new_tokens", None)
            total = getattr(config, "max_length", None)
            new = min(room, max(1, new if new is not None else room if total is None else total - prompt))
        if not 1 <= new <= room:
            raise ConfigError(
                f"prompt and completion must have at most {self.length} tokens; got {prompt} of prompt and {new} new; "
                "shorten them or raise max_length"
            )
        return int(new)

    def _cache(self) -> Any:
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        cache = StaticCache(config=self._model.config, max_cache_len=self._positions)
        # Layers of a sliding window keep their length as a number, for which every step would be another graph; with
        # all positions kept, the mask alone makes the window.
        cache.layers = [StaticLayer(self._positions) for _ in cache.layers]
        return cache


def _take_stop_strings(keywords: dict[str, Any]) -> None:
    """Stop strings as a criterion: transformers would hand the tokenizer on to the model's forward, for which the graph
    would be another."""
    from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

    if keywords.get("stop_strings") and keywords.get("tokenizer") is not None:
        stop = StopStringCriteria(keywords.pop("tokenizer"), keywords.pop("stop_strings"))
        keywords["stopping_criteria"] = StoppingCriteriaList([*(keywords.get("stopping_criteria") or []), stop])


def _filled(values: Tensor, left: int, below: int, value: int | None) -> Tensor:
    """[B, T] → [B + below, left + T]. value: what to put on the left; None repeats each row's first token, which
    logits processors that count tokens have seen anyway."""
    values = torch.cat([values, values[-1:].expand(below, -1)])
    first = values[:, :1] if value is None else torch.full_like(values[:, :1], value)
    return torch.cat([first.expand(-1, left), values], dim=1)


class _Unpadded:
    """A streamer that does not see the padding."""

    def __init__(self, streamer: Any, added: int) -> None:
        self._streamer, self._added = streamer, added

    def put(self, value: Tensor) -> None:
        self._streamer.put(value[..., self._added :])
        self._added = 0

    def end(self) -> None:
        self._streamer.end()
