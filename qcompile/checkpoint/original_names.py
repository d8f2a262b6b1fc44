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


def matrices_of(model: nn.Module, stack: str) -> dict[str, tuple[int, ...]]:
    """What files call the matrices of a stack of experts [E, N, K], without `.weight`, as layouts list linears, and
    their shapes. Empty if they hold the stack as one tensor."""
    shape = model.get_parameter(stack).shape
    parts = original_names(model, {stack: torch.empty(shape, device="meta")})
    apart = all(name.endswith(".weight") and part.ndim == 2 for name, part in parts.items())
    return {name.removesuffix(".weight"): tuple(part.shape) for name, part in parts.items()} if apart else {}
