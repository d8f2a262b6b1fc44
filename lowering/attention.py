"""Attention stays float, but what a target has for it differs: the forms of this package, or torch's own choice."""

import torch
from torch import Tensor

from qcompile.lowering import attention_cpu, attention_cuda
from qcompile.lowering.target import Target
from qcompile.rewrite import equal

FORMS = {"cpu": attention_cpu.attention, "cuda": attention_cuda.attention}


def attention(
    target: Target, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """qcompile.ops.attention, on a target."""
    form = FORMS.get(target.kind)
    y = form(target, query, key, value, mask, causal, scale) if form is not None else None
    return stock(target, query, key, value, mask, causal, scale) if y is None else y


def stock(
    target: Target, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """What torch chooses. But on CPU, only its flash kernel surely reads shared keys where they are, and it takes no
    mask; where it is out of question, keys are repeated, or torch might write out every score."""
    grouped = key.shape[1] != query.shape[1]
    square = not causal or equal(query.shape[2], key.shape[2])
    flash = mask is None and square and attention_cuda.has_flash(target, query, value)
    if grouped and target.kind != "cpu" and not flash:
        shares = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(shares, 1), value.repeat_interleave(shares, 1), False
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
