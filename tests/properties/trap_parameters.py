"""Parameters that traps may use."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Trap = Callable[["Bag", Tensor, Tensor], Tensor]


class Bag(nn.Module):
    """Parameters of every shape a trap may want, for C channels and T tokens; capture takes only those in use."""

    order: Tensor
    reverse: Tensor
    mask: Tensor
    token_mask: Tensor

    def __init__(self, channels: int, tokens: int) -> None:
        super().__init__()
        self.a, self.b = _matrix(channels, channels), _matrix(channels, channels)
        self.bias_a, self.bias_b = _vector(channels), _vector(channels)
        self.gain, self.other_gain = _vector(channels), _vector(channels)
        self.up, self.wide = _matrix(2 * channels, channels), _matrix(channels, 2 * channels)
        self.padded = _matrix(channels, channels + 1)
        self.low_a, self.low_b = _matrix(2, channels), _matrix(channels, 2)
        self.tokens, self.flat = _matrix(tokens, tokens), _matrix(channels, tokens * channels)
        self.positions, self.position_gain = _matrix(tokens, channels), _matrix(tokens, 1)
        self.bank = nn.Parameter(torch.empty(2, channels, channels))
        self.scalar = _vector(1)
        self.register_buffer("order", torch.arange(channels).roll(1))
        self.register_buffer("reverse", torch.arange(tokens).flip(0))
        self.register_buffer("mask", torch.arange(channels) % 3 != 1)
        self.register_buffer("token_mask", (torch.arange(tokens) % 3 != 1).unsqueeze(-1))

    @property
    def half(self) -> int:
        return (self.a.shape[0] + 1) // 2

    @property
    def heads(self) -> int:
        """The smallest divisor of the channels above 1."""
        channels = self.a.shape[0]
        return next((d for d in range(2, channels + 1) if channels % d == 0), 1)


def _matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns))


def _vector(size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(size))


def norm_of(x: Tensor, gain: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain
