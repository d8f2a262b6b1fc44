"""The names that a model's files have for its tensors: transformers renames and fuses some while it loads them.

Experts are the usual case: `experts.0.w1.weight` and its like are two stacks in memory. Taking apart looks at no value,
so stacks of any dtype, and of scales, come apart the same way.
"""

import torch
from torch import Tensor, nn


def original_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names, and in the parts, that others expect in the model's files."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return tensors
    reverted: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return reverted


def stored_names(model: nn.Module, stack: str) -> list[str]:
    """What files call a stack of experts [E, N, K]: its own name, or that of each expert's matrix."""
    value = model.get_parameter(stack)
    return list(original_names(model, {stack: torch.empty(value.shape, dtype=value.dtype, device="meta")}))


def owners_of(model: nn.Module, stack: str) -> list[str]:
    """The same as names of linears, which is what layouts list."""
    return [name.removesuffix(".weight") for name in stored_names(model, stack)]
