"""Traps: second readers that are no linears, channels that move, tokens that move."""

import torch
from properties.trap_parameters import Bag, norm_of
from torch import Tensor
from torch.nn import functional as F

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
