"""Slots: rows of one static cache, which sequences enter and leave independently of each other.

Two kinds of graphs: prefill, [1, T] for a few lengths T, which writes a prompt into one slot; decode, [S, 1], which
takes every slot one token further. Masks are given, so a row attends to nothing but its own tokens, and activations
are quantized per token: what a row computes does not depend on its companions.

Notation: S slots, L positions per slot, T padded prompt length, V vocabulary.
"""

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import ConfigError
from qcompile.generation.compiled_model import Compilations, compile_in_place, compiling, settled
from qcompile.model_limits import cache_name

SHORTEST = 16  # the least padded length: shorter prompts are not worth a graph of their own
# Largest change of a logit, relative to their spread, between a token prefilled and the same token decoded: 1e-7 in
# float32, and little more when an int8 rounding flips; on random weights a wrong position moved 0.16, a wrong mask 0.3.
SELF_CHECK = 0.1


def buckets(longest: int, shortest: int = SHORTEST) -> tuple[int, ...]:
    """Padded lengths up to `longest`, longest first: powers of two, and the longest itself."""
    powers = itertools.takewhile(lambda size: size < longest, (shortest << i for i in itertools.count()))
    return (longest, *reversed(list(powers)))


class Slots:
    """A compiled model with S slots of L positions. Not thread-safe: one thread warms it up and runs it."""

    def __init__(self, model: Any, slots: int, length: int, inner: str = "auto") -> None:
        from qcompile.generation.slot_cache import KeyValues, slot_caches

        self.model, self.slots, self.length = model, slots, length
        self.lengths = buckets(length)
        self.device, self.dtype = model.device, model.dtype
        self._windows = attention_windows(model)
        tokens = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self._cache_name = cache_name(model.forward)
        with torch.no_grad():
            cache = getattr(model(input_ids=tokens, use_cache=True), self._cache_name)
        self._stored = [KeyValues.like(layer, slots, length) for layer in cache.layers]
        self._prefill_cache, self._decode_cache = slot_caches(self._stored)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.compilations: Compilations = compile_in_place(model, inner)

    def warm_up(self, told: Callable[[int, int, str], None] = lambda done, total, what: None) -> None:
        """Compile every graph, longest first, and check that prefill and decode agree. told: progress."""
        steps = [(f"prefill {length}", length) for length in self.lengths]
        total = len(steps) + 1
        with compiling():
            for done, (what, length) in enumerate(steps):
                told(done, total, what)
                self._prefill(0, [0] * min(length, self.length))
            told(len(steps), total, f"decode {self.slots}")
            self._decode([0] * self.slots, [0] * self.slots)
        self._check()
        told(total, total, "ready")

    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """Put a prompt of 1…L tokens into a slot; the logits [V] after its last token."""
        with settled():
            self._empty(slot)
            return self._prefill(slot, tokens)

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """One token for each slot at its position; logits [S, V]. Idle slots take token 0 at position 0."""
        with settled():
            return self._decode(tokens, positions)

    @torch.no_grad()
    def _empty(self, slot: int) -> None:
        """What a prompt left that overflowed, NaN or Inf, would reach others through the mask, which is added."""
        for layer in self._stored:
            layer.keys[slot].zero_()
            layer.values[slot].zero_()

    def _prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        size = min(length for length in self.lengths if length >= len(tokens))
        ids = torch.zeros(1, size, dtype=torch.long)
        ids[0, : len(tokens)] = torch.tensor(tokens)
        positions = torch.arange(size)
        mask = self._mask(positions[None], positions)
        self._prefill_cache.slot.fill_(slot)
        last = torch.tensor([len(tokens) - 1], device=self.device)
        kept = {"logits_to_keep": last} if self._keeps else {}
        logits = self._call(ids, positions[None], mask, self._prefill_cache, **kept)
        row: Tensor = logits[0, 0 if self._keeps else len(tokens) - 1]
        return row

    def _decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        at = torch.tensor(positions)
        mask = self._mask(at[:, None], torch.arange(self.length))
        self._decode_cache.positions.copy_(at)
        logits = self._call(torch.tensor(tokens)[:, None], at[:, None], mask, self._decode_cache)
        rows: Tensor = logits[:, 0]
        return rows

    def _call(self, ids: Tensor, positions: Tensor, mask: Any, cache: Any, **kept: Any) -> Tensor:
        logits: Tensor = self.model(
            input_ids=ids.to(self.device), position_ids=positions.to(self.device), attention_mask=mask,
            use_cache=True, **{self._cache_name: cache}, **kept,
        ).logits  # fmt: skip
        return logits

    def _mask(self, queries: Tensor, keys: Tensor) -> Any:
        """queries [B, Q], keys [C] positions → [B, 1, Q, C], to be added; a dict of them if layers differ."""
        distance = queries[:, None, :, None] - keys
        made = {}
        for kind, window in self._windows.items():
            seen = (distance >= 0) & (distance < window)
            mask = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, torch.finfo(self.dtype).min)
            made[kind] = mask.to(self.device)
        return made if len(made) > 1 else next(iter(made.values()))

    def _check(self) -> None:
        """A token prefilled and the same token decoded, beside busy slots, must give the same logits."""
        count = min(8, self.length - 1)
        tokens = [1 + i % 7 for i in range(count + 1)]
        slot = self.slots - 1
        whole = self.prefill(slot, tokens)
        self.prefill(slot, tokens[:-1])
        stepped = self.decode([*[0] * slot, tokens[-1]], [*[0] * slot, count])[slot]
        moved = float((whole - stepped).abs().max()) / max(float(whole.max() - whole.min()), 1e-6)
        if not moved <= SELF_CHECK:
            raise ConfigError(
                f"serving needs a model whose decode continues its prefill; logits differ by {moved:.0%} of their "
                "spread; this architecture cannot be served; call its generate (docs/generate.md)"
            )


def attention_windows(model: Any) -> dict[str, int]:
    """How far back each kind of layer sees. Raises ConfigError for models that generate nothing, and for layers that
    are no attention over positions."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ConfigError(
            "a compiled cache needs a decoder-only model; got an encoder-decoder; call its generate uncompiled"
        )
    if not model.can_generate():
        raise ConfigError(
            f"a compiled cache needs a model that generates; {type(model).__name__} has no language-model head for it; "
            "use the class that has"
        )
    if getattr(model, "_is_stateful", False):
        raise ConfigError(
            f"a compiled cache needs layers of full or sliding attention; {type(model).__name__} is recurrent; call "
            "its generate uncompiled"
        )
    everything = 1 << 40
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    known = {"full_attention": everything, "sliding_attention": window or everything}
    unknown = sorted(set(kinds) - set(known))
    if unknown:
        raise ConfigError(
            f"a compiled cache needs layers of full or sliding attention; got {', '.join(unknown)}; call the model's "
            "generate uncompiled"
        )
    return {kind: known[kind] for kind in sorted(set(kinds))}
