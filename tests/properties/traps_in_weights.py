"""Traps: weights that are shared or computed, and what lies between a norm or linear and the next linear."""

import torch
from properties.trap_parameters import Bag, norm_of
from torch import Tensor
from torch.nn import functional as F

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
