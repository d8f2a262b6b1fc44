"""Activation outliers on demand: what large models have and small demo models lack.

Multiplying some entries of a norm's gain and dividing the matching columns of the linears it feeds changes nothing that
the model computes, but makes those activation channels as hard to quantize as the outlier channels of large models.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Which linears read which norm in a Llama-style decoder layer.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def inject_outliers(model: nn.Module, *, factor: float = 64.0, channels: int = 2, seed: int = 0) -> int:
    """Scale `channels` random channels of every norm by `factor` (a power of two keeps it exact), in place.

    Returns how many norms were changed.
    """
    generator = torch.Generator().manual_seed(seed)
    changed = 0
    with torch.no_grad():
        for gain, weights in _norms(model):
            chosen = torch.randperm(gain.numel(), generator=generator)[:channels]
            gain[chosen] *= factor
            for weight in weights:
                weight[:, chosen] /= factor
            changed += 1
    return changed


def _norms(model: nn.Module) -> Iterator[tuple[Tensor, list[Tensor]]]:
    for layer in model.modules():
        for norm, readers in READERS.items():
            if hasattr(layer, norm):
                yield getattr(layer, norm).weight, [layer.get_submodule(name).weight for name in readers]  # type: ignore[misc]
