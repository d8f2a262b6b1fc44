"""Experts that hold their stacks in 8 bits: what `qcompile.quantize` leaves, what checkpoints are loaded into.

transformers has a class of experts for each model, which say of themselves how they are laid out and how they gate
(`use_experts_implementation`). An instance becomes one of a subclass of its own class, so that all else about it stays.
Its forward is written in the dialect, as that of `QuantizedLinear`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qcompile import grouped_ops, ops
from qcompile.quantized_linear import filled

STACKS = ("gate_up_proj", "up_proj", "down_proj")


class QuantizedExperts(nn.Module):
    """Experts of which some stacks are quantized, weights per channel, activations per token.

    A quantized stack P [E, N, K] is int8 or fp8, with P_scale [E, N, 1] float32 beside it. Inference only.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    _apply_gate: Callable[[Tensor], Tensor]
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, k] → [T, H], each token's experts weighted and added
        (as transformers' grouped_mm_experts_forward)."""
        picks = top_k_index.shape[-1]
        experts, order = torch.sort(top_k_index.reshape(-1))
        ends = torch.searchsorted(experts, torch.arange(self.num_experts, device=experts.device), right=True)
        offsets = ends.to(torch.int32)
        rows = hidden_states[order // picks]
        up = self._multiply("gate_up_proj" if self.has_gate else "up_proj", rows, experts, offsets)
        inner = self._apply_gate(up) if self.has_gate else self.act_fn(up)
        y = self._multiply("down_proj", inner, experts, offsets)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        y = y[torch.argsort(order)].view(*top_k_index.shape, -1)
        return y.sum(1).to(hidden_states.dtype)

    def _multiply(self, stack: str, rows: Tensor, experts: Tensor, offsets: Tensor) -> Tensor:
        weight, scale = getattr(self, stack), getattr(self, f"{stack}_scale", None)
        y: Tensor
        if scale is None:
            y = grouped_ops.grouped_linear(rows.to(weight.dtype), weight, offsets)
        else:
            rows_q, row_scale = torch.ops.qcompile.quantize(rows, [], "row", weight.dtype)
            operands = rows_q, weight, row_scale, scale.squeeze(-1), offsets
            y = grouped_ops.scaled_grouped_mm(*operands, rows.dtype)
        return y + getattr(self, f"{stack}_bias")[experts] if self.has_bias else y

    def quantized_stacks(self) -> list[str]:
        """Names of the stacks that are in 8 bits."""
        return [stack for stack in STACKS if getattr(self, f"{stack}_scale", None) is not None]

    def put(self, stack: str, weight: Tensor, scale: Tensor) -> None:
        """Hold a stack in 8 bits: weight [E, N, K] and its scales [E, N, 1]."""
        setattr(self, stack, nn.Parameter(weight.detach(), requires_grad=False))
        setattr(self, f"{stack}_scale", nn.Parameter(scale.detach(), requires_grad=False))

    def extra_repr(self) -> str:
        names = {kind: name for name, kind in ops.TORCH_DTYPES.items()}
        stacks = (f"{stack} {names[getattr(self, stack).dtype]}" for stack in self.quantized_stacks())
        return f"{self.num_experts} experts, {', '.join(stacks)}, token"

    def __reduce__(self) -> Any:
        """Copies and pickles name the model's own class; the subclass is made where they are read."""
        return _anew, (type(self).__bases__[1],), self.__dict__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As of QuantizedLinear: a change of dtype does not concern 8-bit weights and their scales."""
        kept = {name: getattr(self, name) for stack in self.quantized_stacks() for name in (stack, f"{stack}_scale")}
        for name in kept:
            delattr(self, name)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, parameter in kept.items():
            setattr(self, name, filled(parameter, fn))
        return self


def why_not_quantized(module: nn.Module) -> str:
    """Why a module cannot become QuantizedExperts; empty if it can."""
    if isinstance(module, QuantizedExperts):
        return ""
    if not all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "num_experts")):
        return "its class does not say how its experts are laid out (transformers' use_experts_implementation)"
    if module.is_transposed:
        return "its stacks are stored as [E, K, N]"
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return "its module has forward hooks"
    return ""


def become_quantized(module: nn.Module) -> QuantizedExperts:
    """Make a module of experts one that can hold its stacks in 8 bits, in place; its stacks stay as they are."""
    if not isinstance(module, QuantizedExperts):
        module.__class__ = _subclass(type(module))
    assert isinstance(module, QuantizedExperts)
    return module


def _subclass(kind: type[nn.Module]) -> type[nn.Module]:
    """One for each class, so that equal modules have equal types."""
    if kind not in _SUBCLASSES:
        _SUBCLASSES[kind] = type(f"Quantized{kind.__name__}", (QuantizedExperts, kind), {"__module__": __name__})
    return _SUBCLASSES[kind]


def _anew(kind: type[nn.Module]) -> nn.Module:
    made = _subclass(kind)
    return made.__new__(made)


_SUBCLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def quantized_experts(model: nn.Module) -> dict[str, QuantizedExperts]:
    """The modules of a model that hold experts in 8 bits, by qualified name."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, QuantizedExperts)}
