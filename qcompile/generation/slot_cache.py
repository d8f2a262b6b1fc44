"""Keys and values of all slots, seen as two caches of transformers: one writes a prompt, one writes a token a row."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from qcompile.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class KeyValues:
    """One layer's keys and values, [S, heads, L, head size]."""

    keys: Tensor
    values: Tensor

    @classmethod
    def like(cls, layer: Any, slots: int, length: int) -> "KeyValues":
        """Room for S slots of L positions of what a dynamic cache's layer holds. Raises ConfigError."""
        made = []
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if not isinstance(tensor, Tensor) or tensor.dim() != 4:
                raise ConfigError(f"serving needs layers that cache keys and values; got {type(layer).__name__}")
            made.append(tensor.new_zeros(slots, tensor.shape[1], length, tensor.shape[3]))
        return cls(*made)


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """What prefill and decode have in common: storage that is there from the start, and masks that are given."""

    is_compileable = True

    def __init__(self, stored: KeyValues) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = stored.keys, stored.values, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        return 0  # positions and masks are given

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x


class PrefillLayer(_Layer):
    """Writes a prompt into slot `slot` [1]; attention sees the prompt alone."""

    def __init__(self, stored: KeyValues, slot: Tensor) -> None:
        super().__init__(stored)
        self.slot = slot

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        size = key_states.shape[2]
        self.keys[:, :, :size].index_copy_(0, self.slot, key_states)
        self.values[:, :, :size].index_copy_(0, self.slot, value_states)
        return key_states, value_states


class DecodeLayer(_Layer):
    """Writes one token a row, at `positions` [S]; attention sees the whole storage, through the mask."""

    def __init__(self, stored: KeyValues, rows: Tensor, positions: Tensor) -> None:
        super().__init__(stored)
        self.rows, self.positions = rows, positions

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[self.rows, :, self.positions] = key_states[:, :, 0]
        self.values[self.rows, :, self.positions] = value_states[:, :, 0]
        return self.keys, self.values


def slot_caches(stored: Sequence[KeyValues]) -> tuple[Any, Any]:
    """(prefill cache with attribute `slot` [1], decode cache with attribute `positions` [S])."""
    keys = stored[0].keys
    rows = torch.arange(keys.shape[0], device=keys.device)
    slot, positions = torch.zeros_like(rows[:1]), torch.zeros_like(rows)
    prefill = Cache(layers=[PrefillLayer(layer, slot) for layer in stored])
    decode = Cache(layers=[DecodeLayer(layer, rows, positions) for layer in stored])
    prefill.slot, decode.positions = slot, positions
    return prefill, decode
