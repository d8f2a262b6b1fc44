"""Where prompts and tokens are written."""

import pytest
import torch

from qcompile.errors import ConfigError
from qcompile.generation.slot_cache import KeyValues, slot_caches


def test_prompts_go_to_their_slot_and_tokens_to_their_positions() -> None:
    stored = KeyValues(torch.zeros(3, 1, 4, 2), torch.zeros(3, 1, 4, 2))
    prefill, decode = slot_caches([stored])
    prefill.slot.fill_(1)
    prompt = torch.ones(1, 1, 2, 2)
    keys, _ = prefill.update(prompt, 2 * prompt, 0)
    assert keys is prompt
    decode.positions.copy_(torch.tensor([0, 2, 3]))
    keys, values = decode.update(torch.full((3, 1, 1, 2), 5.0), torch.full((3, 1, 1, 2), 6.0), 0)
    assert keys[:, 0, :, 0].tolist() == [[5, 0, 0, 0], [1, 1, 5, 0], [0, 0, 0, 5]]
    assert values[:, 0, :, 0].tolist() == [[6, 0, 0, 0], [2, 2, 6, 0], [0, 0, 0, 6]]


def test_layers_without_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="cache keys and values"):
        KeyValues.like(object(), 1, 1)
