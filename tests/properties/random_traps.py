"""Ways to read a norm's output that have broken, or could break, a pass that moves scales around.

Each trap is a function of a bag of parameters `p`, a normalized tensor `h` [..., T, C] and the residual `x` of the same
shape; it returns a tensor of that shape (or one that broadcasts to it). Every name in TRAPS is one trap.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


# Second readers that are no linears.


def softmax_reader(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h, p.a) + h.softmax(-1)


def mean_reader(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h, p.a) + h.mean(-1, keepdim=True)


def token_mean_reader(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h.mean(-2, keepdim=True), p.a) + F.linear(h, p.b)


def sum_over_channels(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h, p.a) * h.sum(-1, keepdim=True).tanh()


def largest_channel(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h, p.a) + h.amax(-1, keepdim=True)


def sorted_channels(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h.sort(-1).values, p.a) + F.linear(h, p.b)


def cumulative(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h, p.a) + h.cumsum(-2)


def residual_of_norm(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return h + F.linear(h, p.a)


def difference(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return 1.0 - (F.linear(h, p.a) - h)


def scaled_sum(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return torch.add(F.linear(h, p.a), h, alpha=2)


def norm_of_norm(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(norm_of(h, p.gain), p.a) + F.linear(h, p.b)


def layer_norm_of_linear(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.layer_norm(F.linear(h, p.a), (h.shape[-1],), p.gain, p.bias_a), p.b)


# Channels that move.


def slice_of_channels(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h[..., : p.half], p.a[:, : p.half])


def columns_apart(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h[..., : p.half], p.a[:, : p.half]) + F.linear(h[..., p.half :], p.a[:, p.half :])


def even_channels(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h[..., ::2], p.a[:, ::2]) + F.linear(h, p.b)


def flip_of_channels(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h.flip(-1), p.a) + F.linear(h, p.b)


def flip_only(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h.flip(-1), p.a)


def rolled_channels(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h.roll(1, -1), p.a)


def gathered_channels(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h[..., p.order], p.a) + F.linear(h, p.b)


def index_select_channels(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h.index_select(-1, p.order), p.a)


def swapped_halves(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(torch.cat([h[..., p.half :], h[..., : p.half]], -1), p.a)


def rotated_halves(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(torch.cat([-h[..., p.half :], h[..., : p.half]], -1) + h, p.a)


def padded_channels(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.pad(h, (1, 0)), p.padded)


def padded_with_ones(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.pad(h, (0, 1), value=1.0), p.padded)


def padded_with_parameter(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(torch.cat([h, p.scalar.expand(*h.shape[:-1], 1)], -1), p.padded)


def repeated_channels(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h.repeat_interleave(2, -1), p.wide)


def tiled_channels(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h.unsqueeze(-2).expand(*h.shape[:-1], 2, h.shape[-1]).reshape(*h.shape[:-1], -1), p.wide)


def cat_of_two_norms(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(torch.cat([norm_of(x, p.gain), h], -1), p.wide)


def cat_twice(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(torch.cat([h, h], -1), p.wide) + F.linear(h, p.a)


def stacked(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    first, second = torch.stack([h, norm_of(x, p.gain)]).unbind(0)
    return F.linear(second, p.a) + F.linear(first, p.b)


def shuffled_heads(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = h.reshape(*h.shape[:-1], p.heads, -1).transpose(-1, -2).reshape(h.shape)
    return F.linear(y, p.a)


def linear_per_head(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = h.reshape(*h.shape[:-1], p.heads, -1)
    return F.linear(y, p.a[: y.shape[-1], : y.shape[-1]]).reshape(h.shape)


def summed_heads(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.linear(h, p.a).view(*h.shape[:-1], p.heads, -1).sum(-2)
    return F.linear(y, p.b[:, : y.shape[-1]])


def mean_of_heads(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.linear(h, p.a).view(*h.shape[:-1], p.heads, -1).mean(-1)
    return F.linear(y, p.b[:, : p.heads])


# Tokens that move.


def token_shift(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(torch.cat([torch.zeros_like(h[..., :1, :]), h[..., :-1, :]], -2), p.a) + F.linear(h, p.b)


def token_pad(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.pad(h, (0, 0, 1, -1)), p.a)


def token_mixing(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h.transpose(-1, -2), p.tokens).transpose(-1, -2)


def token_and_channel_mixing(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.linear(h.transpose(-1, -2), p.tokens).transpose(-1, -2), p.a) + F.linear(h, p.b)


def first_token(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h[..., :1, :], p.a) + F.linear(h[..., -1, :].unsqueeze(-2), p.b)


def gathered_tokens(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h[..., p.reverse, :], p.a)


def flattened_tokens(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h.reshape(*h.shape[:-2], -1), p.flat).unsqueeze(-2)


def position_added(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h + p.positions, p.a)


def position_gain(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h * p.position_gain, p.a)


def position_and_channel_gain(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(norm_of(x, p.positions), p.a) + F.linear(norm_of(x, p.gain) * p.positions, p.b)


def masked_tokens(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h.masked_fill(~p.token_mask, 0.0), p.a)


def masked_with_minus_one(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h.masked_fill(~p.token_mask, -1.0), p.a)


def chosen_tokens(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(torch.where(p.token_mask, h, norm_of(x, p.gain)), p.a)


def transposed_batch(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h.transpose(0, -2), p.a).transpose(0, -2)


def causal_convolution(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.linear(h, p.a)
    return F.linear(y * p.gain + F.pad(y, (0, 0, 1, -1)) * p.other_gain, p.b)


# Weights that are shared or computed.


def both_orientations(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return h @ p.a + h @ p.a.t()


def tied_autoencoder(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(h, p.up)), p.up.t())


def tied_twice(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h, p.a) + F.linear(norm_of(x, p.gain), p.a)


def tied_in_a_row(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(h, p.a, p.bias_a)), p.a, p.bias_a)


def one_bank(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(h, p.bank[0])), p.bank[1])


def one_bank_unbound(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    first, second = p.bank.unbind(0)
    return F.linear(F.relu(F.linear(h, first)), second)


def packed_rows(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    c = h.shape[-1]
    return F.linear(h, p.up[:c]) * F.linear(h, p.up[c:]).sigmoid()


def lora(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h, p.a + p.low_b @ p.low_a)


def lora_beside(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h, p.a) + F.linear(F.linear(h, p.low_a), p.low_b)


def weight_norm(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h, p.gain.unsqueeze(1) * p.a / p.a.norm(dim=1, keepdim=True))


def weight_in_float32(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    wide = torch.promote_types(h.dtype, torch.float32)
    return F.linear(h.to(wide), p.a.to(wide)).to(h.dtype)


def gain_as_weight_column(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(norm_of(x, p.gain), torch.cat([p.gain.unsqueeze(1), p.a[:, 1:]], 1))


def gain_as_weight(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(norm_of(x, p.gain), p.gain.unsqueeze(0)) + F.linear(norm_of(x, p.gain), p.b)


def row_of_weight_as_gain(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(norm_of(x, p.a[0]), p.a) + F.linear(norm_of(x, p.a[0]), p.b)


def exponential_gain(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(norm_of(x, p.gain.exp()), p.a)


def scalar_gain(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(norm_of(x, p.scalar), p.a) + F.linear(h * p.scalar, p.b)


def gain_per_head(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = x.reshape(*x.shape[:-1], p.heads, -1)
    return F.linear(norm_of(y, p.gain[: y.shape[-1]]).reshape(x.shape), p.a)


def bias_is_gain(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, (x.shape[-1],), p.gain, p.gain), p.a)


def bias_shared_by_linear(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, (x.shape[-1],), p.gain, p.bias_a), p.a, p.bias_a)


def bias_without_gain(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, (x.shape[-1],), None, p.bias_a), p.a)


def computed_bias(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(h, p.a, p.b @ p.bias_a)), p.b)


def bias_of_the_data(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    flat = h.reshape(-1, h.shape[-1])
    return torch.addmm(x.reshape(-1, x.shape[-1])[0], flat, p.a.t()).view(h.shape)


def scaled_addmm(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return torch.addmm(p.bias_a, h.reshape(-1, h.shape[-1]), p.a.t(), beta=0.5, alpha=2).view(h.shape)


def addmm_onto_residual(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    flat = torch.addmm(x.reshape(-1, x.shape[-1]), h.reshape(-1, h.shape[-1]), p.a.t())
    return F.linear(F.relu(flat), p.b).view(h.shape)


def vector_times_matrix(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return torch.mv(p.a, h.reshape(-1, h.shape[-1])[0]) + F.linear(h, p.b)


def einsum(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("...k,nk->...n", h, p.a)


# Between a norm or linear and the next linear.


def second_gain(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h * p.gain, p.a) + F.linear(h, p.b)


def two_gains(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(norm_of(x, p.gain) * p.other_gain, p.a)


def divided_by_parameter(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h / (p.gain.square() + 1), p.a)


def parameter_divided(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(p.gain / (1 + x.square()), p.a)


def constant_added(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h + 0.25, p.a)


def parameter_added(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h + p.bias_a, p.a) + F.linear(h, p.b)


def bias_between_linears(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.linear(h, p.a) + p.bias_a, p.b)


def bias_subtracted(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(p.bias_a - F.linear(h, p.a), p.b)


def constant_between_linears(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(h, p.a) + 0.5), p.b)


def masked_channels(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.linear(h, p.a) * p.mask.to(h.dtype), p.b)


def scalar_scale(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.linear(h * 0.7, p.a) / 3, p.b)


def in_place_sum(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.linear(h, p.a)
    y.add_(h)
    return F.linear(y.mul_(0.5), p.b)


def in_place_gain(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    z = h.clone()
    y = F.linear(z, p.a)
    z.mul_(p.gain)
    return y + F.linear(z, p.b)


def in_place_relu(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.linear(h, p.a, p.bias_a).relu_(), p.b)


def channel_overwritten(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    z = h.clone()
    z[..., 0] = 1.0
    return F.linear(z, p.a)


def channel_zeroed(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    z = h.clone()
    z[..., 0] = 0.0
    return F.linear(z, p.a) + F.linear(h, p.b)


def half_scaled_in_place(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    z = F.linear(h, p.a)
    z[..., : p.half] *= 2
    return F.linear(z, p.b)


def relu_squared(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(h, p.a)).square(), p.b)


def self_product(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.linear(h, p.a)
    return F.linear(y * y, p.b)


def self_gate(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h * F.linear(h, p.a).sigmoid(), p.b)


def bilinear(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.linear(h, p.a) * F.linear(h, p.b), p.up[: h.shape[-1]])


def negated_and_absolute(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear((-F.linear(h, p.a, p.bias_a)).abs(), p.b)


def clamped(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.linear(h, p.a).clamp(min=0.0), p.b) + F.linear(F.linear(h, p.b).clamp(max=0.5), p.a)


def bounded_relu(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.relu6(F.linear(h, p.a)), p.b)


def leaky(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.leaky_relu(F.linear(h, p.a, p.bias_a), 0.1), p.b)


def learned_leak(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.linear(h, p.a, p.bias_a)
    return F.linear(torch.where(y > 0, y, y * p.gain), p.b)


def thresholded(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.linear(h, p.a)
    return F.linear(torch.where(y > 0.5, y, torch.zeros_like(y)), p.b)


def larger_of_two(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(torch.maximum(F.linear(h, p.a), F.linear(h, p.b)), p.up[: h.shape[-1]])


def rows_with_two_readers(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.linear(h, p.a, p.bias_a)
    return F.linear(y, p.b) + F.linear(F.relu(y), p.up[: h.shape[-1]])


def rows_summed(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.linear(h, p.a, p.bias_a) + F.linear(h, p.b).flip(-1)
    return F.linear(y, p.up[: h.shape[-1]])


def interpolated(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(torch.lerp(h, F.linear(h, p.a), 0.3), p.b)


def multiply_add(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(torch.addcmul(F.linear(h, p.a), h, p.gain, value=0.5), p.b)


def linear_attention(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    q, k, v = F.linear(h, p.a), F.linear(h, p.b), F.linear(h, p.up[: h.shape[-1]])
    return F.linear(q @ (k.transpose(-1, -2) @ v), p.a) / (h.shape[-1] * h.shape[-2])


def attention_over_norm(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    scores = (F.linear(h, p.a) @ h.transpose(-1, -2) / 4).softmax(-1)
    return F.linear(scores @ h, p.b)


def averaged_values(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    scores = (x @ x.transpose(-1, -2) / 8).softmax(-1)
    return F.linear(scores @ F.linear(h, p.a, p.bias_a), p.b)


def padded_attention(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    v = F.pad(F.linear(h, p.a), (0, 0, 1, 0))
    k = F.pad(h, (0, 0, 1, 0))
    return F.linear(F.scaled_dot_product_attention(h, k, v), p.b)


def routed(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    weights, chosen = F.linear(h, p.low_a).softmax(-1).topk(1)
    experts = torch.stack([F.linear(h, p.a), F.linear(F.relu(F.linear(h, p.b)), p.a)], -2)
    index = chosen.unsqueeze(-1).expand(*chosen.shape, h.shape[-1])
    return experts.gather(-2, index).squeeze(-2) * weights


def batch_norm(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.linear(h, p.a, p.bias_a).reshape(-1, h.shape[-1])
    y = F.batch_norm(y, p.gain, p.other_gain.square() + 0.1, p.gain, p.bias_b)
    return F.linear(F.relu(y), p.b).view(h.shape)


def group_norm(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.linear(h, p.a).reshape(-1, h.shape[-1])
    return F.linear(F.group_norm(y, p.heads, p.gain, p.bias_a), p.b).view(h.shape)


def norm_over_tokens_and_channels(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, x.shape[-2:], p.positions, p.positions), p.a) + F.linear(h, p.b)


def learned_slope(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.prelu(F.linear(h, p.a), p.scalar), p.b)


def relu_as_maximum(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.linear(h, p.a, p.bias_a)
    return F.linear(torch.maximum(y, torch.zeros_like(y)), p.b)


def nonzero_mask(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.relu(F.linear(h, p.a))
    return F.linear(y + (y != 0) * F.linear(h, p.b), p.up[: h.shape[-1]])


def sign_times(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.linear(h, p.a)
    return F.linear(y.sign() * y, p.b)


def root_of_square(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear((F.linear(h, p.a).square() + 0.1).sqrt(), p.b)


def divided_by_largest(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.linear(h, p.a)
    return F.linear(y / (y.abs().amax(-1, keepdim=True) + 1), p.b)


def unit_vectors(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.normalize(F.linear(h, p.a), dim=-1, eps=1e-3), p.b)


def gated_linear_unit(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.glu(F.linear(h, p.up), -1), p.a)


def gain_along_two_axes(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    outer = h.unsqueeze(-1) * p.gain * p.gain.unsqueeze(-1)
    return F.linear(outer.sum(-1), p.a)


def sum_times_gain(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h * p.gain + F.linear(h, p.a).sum(-1, keepdim=True) * p.gain, p.b)


def rotary(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.linear(h, p.a)
    turned = torch.cat([-y[..., p.half :], y[..., : p.half]], -1)
    return F.linear(y * p.positions.cos() + turned * p.positions.sin(), p.b)


def complex_rotation(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    wide = torch.promote_types(h.dtype, torch.float32)
    y = F.linear(h, p.up).to(wide).reshape(*h.shape, 2)
    turned = torch.view_as_complex(y) * torch.polar(torch.ones_like(y[..., 0]), p.bias_a.to(wide).expand(h.shape))
    return F.linear(torch.view_as_real(turned).flatten(-2).to(h.dtype), p.wide)


def depthwise_convolution(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.linear(h, p.a).reshape(-1, *h.shape[-2:]).transpose(1, 2)
    y = F.conv1d(y, p.padded[:, :1].unsqueeze(1), p.bias_a, groups=h.shape[-1])
    return F.linear(y.transpose(1, 2), p.b).reshape(h.shape)


def scattered(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    index = p.order.expand(h.shape)
    return F.linear(torch.zeros_like(h).scatter_add(-1, index, h), p.a)


def differences(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(torch.diff(F.pad(h, (1, 0)), dim=-1), p.a) + F.linear(h, p.b)


def folded_windows(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    y = F.pad(h, (0, 1)).unfold(-1, 2, 1)
    return F.linear(y.flatten(-2), p.wide)


def without_nan(p: Bag, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(torch.nan_to_num(F.linear(h, p.a), nan=1.0), p.b)


TRAPS: dict[str, Trap] = {
    name: function
    for name, function in list(globals().items())
    if callable(function) and getattr(function, "__module__", "") == __name__
    and not name.startswith("_") and name not in ("Bag", "norm_of")
}  # fmt: skip
