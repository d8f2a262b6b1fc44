"""One static cache for prompts and batches of every size, and what goes through the model padded for it.

`generate` itself knows nothing of the padding: inputs are padded on their way to the model, and outputs are cut on
their way back. Prompts are padded on the left, since the last token's logits are the ones that count; batches below.

Notation: B rows and T tokens as `generate` has them.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

PADDED = ("position_ids", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


class PaddedCache(StaticCache):  # type: ignore[misc]
    """Keys and values [B + below, heads, positions, head size] of a sequence that begins with `left` tokens of
    padding. left, below: to be set before the first call of the model."""

    def __init__(self, config: Any, positions: int) -> None:
        super().__init__(config=config, max_cache_len=positions)
        # Layers of a sliding window keep their length as a number, for which every step would be another graph; with
        # all positions kept, the mask alone makes the window.
        self.layers[:] = (StaticLayer(positions) for _ in range(len(self.layers)))
        self.left = self.below = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """beam_idx [B]: rows of padding stay where they are."""
        below = torch.arange(self.below, device=beam_idx.device) + len(beam_idx)
        super().reorder_cache(torch.cat([beam_idx, below]))

    def padded(self, values: Tensor, value: int | None = None) -> Tensor:
        """[..., B, T] → [..., B + below, left + T]. value: what to put on the left; None repeats the first one."""
        *outer, _, _ = values.shape
        values = torch.cat([values, values[..., -1:, :].expand(*outer, self.below, -1)], dim=-2)
        first = values[..., :1] if value is None else torch.full_like(values[..., :1], value)
        return torch.cat([first.expand(*first.shape[:-1], self.left), values], dim=-1)

    def padded_inputs(self, ids: Tensor, keywords: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The arguments of `prepare_inputs_for_generation`: ids [B, T], and what is as long."""
        mask = keywords.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        made = {**keywords, "attention_mask": self.padded(mask, 0)}
        for name in PADDED:
            values = keywords.get(name)
            if values is not None:
                values = values.expand(*values.shape[:-2], len(ids), -1)
                made[name] = self.padded(values, 0 if name == "position_ids" else None)
        return self.padded(ids), made

    def cut(self, outputs: Any) -> None:
        """Logits, hidden states [B, T, …] and attention [B, heads, T, T] of the model, without what is padding."""
        rows = slice(len(outputs.logits) - self.below)
        outputs.logits = outputs.logits[rows]
        hidden, attention = outputs.get("hidden_states"), outputs.get("attentions")
        if hidden is not None:
            outputs.hidden_states = tuple(value[rows, self._first(value.shape[1]) :] for value in hidden)
        if attention is not None:
            seen = slice(self.left, int(self.get_seq_length()))
            outputs.attentions = tuple(value[rows, :, self._first(value.shape[2]) :, seen] for value in attention)

    def _first(self, queries: int) -> int:
        """The first query that is no padding: a step after the prompt has one query only."""
        return self.left if queries > 1 else 0

    def without_padding(self, config: Any) -> DynamicCache:
        """What transformers' own cache would hold: a call that is given it goes on where this one ended."""
        made, end = DynamicCache(config=config), int(self.get_seq_length())
        for index, layer in enumerate(self.layers):
            if layer.is_initialized:
                kept = (slice(len(layer.keys) - self.below), slice(None), slice(self.left, end))
                made.update(layer.keys[kept], layer.values[kept], index)
        return made
