"""Each transfer rule: exact in float64 under hostile statistics; what folds is what docs/smoothing.md says."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import captured
from probe import Body, randomized, smoothed
from torch import Tensor, nn
from torch.nn import functional as F

from qcompile.capture import Captured
from qcompile.passes import gauge_rules
from qcompile.passes.smooth import Smooth

aten = torch.ops.aten

K = 16  # channels
HALF = K // 2
PINNED = "nothing before its input can take a scale"  # the pin lies on what an op read, its result is a plain value
COARSE = "tied so coarsely"


@dataclasses.dataclass(frozen=True)
class Case:
    """A forward over norm → … → linears; which linears fold, and why each other one does not.

    rule: the rule under test; the captured graph must contain an op that it handles.
    """

    rule: Callable[..., Any]
    body: Callable[..., Any]
    folds: set[str] = dataclasses.field(default_factory=lambda: {"fc"})
    unfolded: dict[str, str] = dataclasses.field(default_factory=dict)
    dynamic: bool = False


CASES: dict[str, Case] = {}


def case(rule: Callable[..., Any], folds: str = "fc", dynamic: bool = False, **unfolded: str) -> Any:
    """Register a body. `folds` lists linears by name, `unfolded` gives the others with part of the reason."""

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        CASES[body.__name__] = Case(rule, body, set(folds.split()), unfolded, dynamic)
        return body

    return register


def model(body: Callable[..., Any]) -> Body:
    """Everything a body may use. Parts that it does not use are not captured."""
    return Body(
        body,
        norm=nn.LayerNorm(K),
        norm2=nn.LayerNorm(K),
        up=nn.Linear(K, K),
        gate=nn.Linear(K, K),
        q=nn.Linear(K, K),
        k=nn.Linear(K, K),
        qkv=nn.Linear(K, 3 * K),
        fc=nn.Linear(K, 5),
        fc2=nn.Linear(K, 5),
        wide=nn.Linear(2 * K, 5),
        low=nn.Linear(HALF, 5),
        high=nn.Linear(HALF, 5),
        tokens=nn.Linear(3, 5),
        vector=nn.Parameter(torch.empty(K)),
        scalar=nn.Parameter(torch.empty(())),
        matrix=nn.Parameter(torch.randn(K, K)),
        prefix=nn.Parameter(torch.randn(2, 2, K)),
        bank=nn.Parameter(torch.randn(K, 2 * K)),
    )


def example() -> Tensor:
    return torch.randn(2, 3, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# pin_all: no identity, so nothing scaled may come in.


@case(gauge_rules.pin_all, "up", fc="gelu")
def gelu_before_a_linear(m: Any, x: Tensor) -> Tensor:
    return m.fc(F.gelu(m.up(m.norm(x))))


@case(gauge_rules.pin_all, "", fc="softmax")
def a_nonlinear_second_reader(m: Any, x: Tensor) -> Any:
    h = m.norm(x)
    return m.fc(h), torch.softmax(h, -1) * 2


@case(gauge_rules.pin_all, "", fc="returned from the model")
def the_norm_is_an_output(m: Any, x: Tensor) -> Any:
    h = m.norm(x)
    return m.fc(h), h


@case(gauge_rules.pin_all, "", fc="no scale passes through, _softmax")
def a_linear_on_softmax(m: Any, x: Tensor) -> Tensor:
    return m.fc(torch.softmax(x, -1))


@case(gauge_rules.pin_all, "up", fc="cumsum")
def a_running_sum(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.up(m.norm(x)).cumsum(1))


@case(gauge_rules.pin_all, "up", fc="amax")
def a_maximum_over_channels(m: Any, x: Tensor) -> Tensor:
    u = m.up(m.norm(x))
    return m.fc(u) + u.amax(-1, keepdim=True)


@case(gauge_rules.pin_all, "up", fc="convert_element_type")
def integers_carry_no_scale(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.up(m.norm(x)).to(torch.int64).to(torch.float64))


# takes_result


@case(gauge_rules.takes_result, "up low high")
def halves_of_a_linear(m: Any, x: Tensor) -> Tensor:
    left, right = m.up(m.norm(x)).chunk(2, -1)
    return m.low(left) + m.high(right)


@case(gauge_rules.takes_result, "up low")
def packed_gate_and_up(m: Any, x: Tensor) -> Tensor:
    gate, up = m.up(m.norm(x)).chunk(2, -1)
    return m.low(F.silu(gate) * up)


# passes_through


@case(gauge_rules.passes_through, "up fc")
def relu(m: Any, x: Tensor) -> Tensor:
    return m.fc(torch.relu(m.up(m.norm(x))))


@case(gauge_rules.passes_through, "up fc")
def absolute_and_negated(m: Any, x: Tensor) -> Tensor:
    return m.fc(-m.up(m.norm(x)).abs())


@case(gauge_rules.passes_through, "up fc")
def there_and_back_between_dtypes(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.up(m.norm(x)).float().double())


# clamps


@case(gauge_rules.clamps, "up fc")
def clamped_from_below_at_zero(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.up(m.norm(x)).clamp(min=0))


@case(gauge_rules.clamps, "up fc")
def clamped_from_above_at_zero(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.up(m.norm(x)).clamp(max=0.0))


@case(gauge_rules.clamps, "up", fc="clamp")
def clamped_at_minus_one(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.up(m.norm(x)).clamp(min=-1))


@case(gauge_rules.clamps, "up", fc="clamp")
def clamped_between_zero_and_one(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.up(m.norm(x)).clamp(0, 1))


# compares


@case(gauge_rules.compares, "up fc")
def compared_with_zero(m: Any, x: Tensor) -> Tensor:
    u = m.up(m.norm(x))
    return m.fc(u * (u > 0) - u * (u <= 0))


@case(gauge_rules.compares, "up", fc="gt")
def compared_with_a_half(m: Any, x: Tensor) -> Tensor:
    u = m.up(m.norm(x))
    return m.fc(u * (u > 0.5))


# fills


@case(gauge_rules.fills, "up fc")
def zeros_fit_any_scale(m: Any, x: Tensor) -> Tensor:
    u = m.up(m.norm(x))
    return m.fc(torch.cat([torch.zeros_like(u), u + u.new_zeros(2, 3, K)], 1))


@case(gauge_rules.fills, "up", fc="differs between tokens")
def ones_fit_none(m: Any, x: Tensor) -> Tensor:
    u = m.up(m.norm(x))
    return m.fc(torch.cat([torch.full_like(u, 1), u], 1))


@case(gauge_rules.fills, "up", fc="normalized")
def zeros_hide_no_scaled_neighbour(m: Any, x: Tensor) -> Tensor:
    """A line of zeros and one scaled value speaks with the scaled value's voice."""
    u = m.up(m.norm(x))
    h = torch.cat([torch.zeros_like(u), u, torch.zeros_like(u)], 1)
    return m.fc(h) + F.layer_norm(h, [K]).sum(-1, keepdim=True)


# reshapes


@case(gauge_rules.reshapes, "up fc")
def heads_and_back(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.up(m.norm(x)).view(2, 3, 4, 4).transpose(1, 2).transpose(1, 2).reshape(2, 3, K))


@case(gauge_rules.reshapes, "up fc")
def unsqueezed_and_squeezed(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.up(m.norm(x)).unsqueeze(-2).relu().squeeze(-2))


@case(gauge_rules.reshapes, "up low")
def tokens_twice_as_many(m: Any, x: Tensor) -> Tensor:
    """Channels k and k + K/2 come to stand on one column: tied in pairs."""
    return m.low(m.up(m.norm(x)).reshape(2, 6, HALF))


# expands


@case(gauge_rules.expands, "up fc")
def expanded_over_a_new_dimension(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.up(m.norm(x)).unsqueeze(1).expand(2, 4, 3, K).relu())


@case(gauge_rules.expands, "q wide")
def repeated_for_a_group_of_heads(m: Any, x: Tensor) -> Tensor:
    """Hugging Face's repeat_kv: heads at stride 0."""
    v = m.q(m.norm(x)).view(2, 3, 4, 4).transpose(1, 2)
    v = v[:, :, None].expand(2, 4, 2, 3, 4).reshape(2, 8, 3, 4)
    return m.wide(v.transpose(1, 2).reshape(2, 3, 2 * K))


# moves


@case(gauge_rules.moves, "low high")
def slices_of_channels(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    return m.low(h[..., :HALF]) + m.high(h[..., -HALF:])


@case(gauge_rules.moves, "low")
def every_other_channel(m: Any, x: Tensor) -> Tensor:
    return m.low(m.norm(x)[..., 1::2])


@case(gauge_rules.moves, "fc fc2")
def channels_in_another_order(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    return m.fc(h.flip(-1)) + m.fc2(h)


@case(gauge_rules.moves, "fc wide")
def channels_repeated(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    return m.wide(h.repeat(1, 1, 2)) + m.fc(h)


@case(gauge_rules.moves, "qkv fc fc2")
def packed_qkv_by_split(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(m.norm(x)).split(K, -1)
    return m.fc(q) + m.fc2(k.abs()) + F.layer_norm(v, [K])[..., :5]


@case(gauge_rules.moves, "qkv fc")
def packed_qkv_by_view_and_select(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.qkv(m.norm(x)).view(2, 3, K, 3)[..., -1])


@case(gauge_rules.moves, "qkv fc")
def packed_qkv_by_unbind(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(m.norm(x)).view(2, 3, 3, K).unbind(-2)
    return m.fc(v) + torch.softmax(q + k, -1)[..., :5]


@case(gauge_rules.moves, "tokens", fc=COARSE)
def a_transposed_reader(m: Any, x: Tensor) -> Any:
    """A linear over tokens sums tokens of one channel and reads all channels alike: one scale for everything."""
    h = m.norm(x).reshape(2 * 3, K)[:3]
    return m.fc(h), m.tokens(h.t())


@case(gauge_rules.moves, "up fc")
def no_tokens_at_all(m: Any, x: Tensor) -> Any:
    u = m.up(m.norm(x))
    return m.fc(u), u[:, :0].sum(1)[:, :0]


@case(gauge_rules.moves, "up fc")
def a_symbolic_number_of_tokens(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.up(m.norm(x))[:, : x.shape[1] - 1])


# pads


@case(gauge_rules.pads, "up", wide=PINNED)
def padded_with_zeros(m: Any, x: Tensor) -> Tensor:
    """The channels that are not padding fold."""
    return m.wide(F.pad(m.up(m.norm(x)), (K // 4, 3 * K // 4, 1, 0)))


@case(gauge_rules.pads, "up low")
def cropped_by_a_negative_pad(m: Any, x: Tensor) -> Tensor:
    return m.low(F.pad(m.up(m.norm(x)), (-2, 2 - HALF)))


@case(gauge_rules.pads, "up", wide="constant_pad_nd")
def padded_with_ones(m: Any, x: Tensor) -> Tensor:
    return m.wide(F.pad(m.up(m.norm(x)), (0, K), value=1.0))


# concatenates


@case(gauge_rules.concatenates, "up wide")
def channels_side_by_side(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    return m.wide(torch.cat([h, m.up(h)], -1))


@case(gauge_rules.concatenates, "fc")
def learned_tokens_in_front(m: Any, x: Tensor) -> Tensor:
    return m.fc(torch.cat([m.prefix, m.norm(x)], dim=1))


@case(gauge_rules.concatenates, "", wide=PINNED)
def beside_a_plain_input(m: Any, x: Tensor) -> Tensor:
    """Half of the channels fold; the other half is the model's input."""
    return m.wide(torch.cat([m.norm(x), x], -1))


@case(gauge_rules.concatenates, "", fc="differs between tokens")
def plain_tokens_behind(m: Any, x: Tensor) -> Tensor:
    return m.fc(torch.cat([m.norm(x), x], 1))


# multiplies


@case(gauge_rules.multiplies, "gate up fc")
def gated(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    return m.fc(F.silu(m.gate(h)) * m.up(h))


@case(gauge_rules.multiplies, "gate up", fc="multiplied by another scaled value")
def a_product_of_two_scaled_values(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    return m.fc(m.gate(h) * m.up(h))


@case(gauge_rules.multiplies, "up", fc="multiplied by another scaled value")
def squared(m: Any, x: Tensor) -> Tensor:
    u = torch.relu(m.up(m.norm(x)))
    return m.fc(u * u)


@case(gauge_rules.multiplies, "fc")
def two_gains_in_a_row(m: Any, x: Tensor) -> Tensor:
    """Either may take the scale; the later one is the one that is pinned."""
    return m.fc(m.norm(x) * m.vector * 3)


@case(gauge_rules.multiplies, "fc")
def a_gain_of_one_plus(m: Any, x: Tensor) -> Tensor:
    """Gemma: the parameter is g, the gain 1 + g."""
    return m.fc(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + m.vector))


@case(gauge_rules.multiplies, "fc fc2")
def one_parameter_read_in_two_ways(m: Any, x: Tensor) -> Tensor:
    """Each reader gets a scaled copy of its own."""
    z = torch.tanh(x)
    return m.fc(m.vector * z) + m.fc2((1 + m.vector) * z)


@case(gauge_rules.multiplies, "", fc=COARSE)
def a_gain_for_all_channels(m: Any, x: Tensor) -> Tensor:
    return m.fc(torch.tanh(x) * m.scalar)


@case(gauge_rules.multiplies, "fc matrix")
def a_parameter_as_gain_and_as_weight(m: Any, x: Tensor) -> Tensor:
    return m.fc(F.linear(torch.tanh(x) * m.matrix[0], m.matrix))


# divides


@case(gauge_rules.divides, "up fc")
def divided_by_an_unscaled_value(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.up(m.norm(x)) / (x.abs().sum(-1, keepdim=True) + 1))


@case(gauge_rules.divides, "up", fc="used as a divisor")
def a_scaled_divisor(m: Any, x: Tensor) -> Tensor:
    u = m.up(m.norm(x)).abs() + 0.0
    return m.fc(u) + (x / u).sum(-1, keepdim=True)


@case(gauge_rules.divides, "fc")
def a_parameter_over_an_activation(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.vector / (x.abs() + 1))


@case(gauge_rules.divides, "fc")
def over_a_parameter(m: Any, x: Tensor) -> Tensor:
    """The same parameter is gain and divisor: only the gain's copy is scaled."""
    return m.fc(torch.tanh(x) * m.vector / m.vector)


# adds


@case(gauge_rules.adds, "up fc")
def a_bias_after_the_linear(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.up(m.norm(x)) + m.vector)


@case(gauge_rules.adds, "up", fc="add")
def a_constant_after_the_linear(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.up(m.norm(x)) + 1)


@case(gauge_rules.adds, "up", fc="sub")
def one_minus(m: Any, x: Tensor) -> Tensor:
    """The scalar is the left operand."""
    return m.fc(1 - m.up(m.norm(x)))


@case(gauge_rules.adds, "up fc")
def zero_minus(m: Any, x: Tensor) -> Tensor:
    return m.fc(0 - m.up(m.norm(x)) + 0)


@case(gauge_rules.adds, "", up="normalized", fc="normalized")
def a_residual_that_reads_the_norm(m: Any, x: Tensor) -> Tensor:
    """BERT's order."""
    h = m.norm(x)
    y = h + m.up(h)
    return m.fc(y) + m.norm2(y).sum(-1, keepdim=True)


@case(gauge_rules.adds, "up gate fc")
def a_weighted_sum_of_two_linears(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    return m.fc(torch.sub(m.up(h), m.gate(h), alpha=3))


@case(gauge_rules.adds, "up", fc="added to a value with another scale")
def the_residual_stream(m: Any, x: Tensor) -> Tensor:
    return m.fc(x + m.up(m.norm(x)))


# selects


@case(gauge_rules.selects, "up fc")
def masked_with_zero(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.up(m.norm(x)).masked_fill(x > 1, 0.0))


@case(gauge_rules.selects, "up", fc="where")
def masked_with_minus_infinity(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.up(m.norm(x)).masked_fill(x > 1, -1e4))


@case(gauge_rules.selects, "up fc")
def one_of_two_learned_values(m: Any, x: Tensor) -> Tensor:
    return m.fc(torch.where(x > 0, m.up(m.norm(x)), m.vector))


@case(gauge_rules.selects, "up", fc="chosen against a value with another scale")
def one_of_a_scaled_and_a_plain_value(m: Any, x: Tensor) -> Tensor:
    return m.fc(torch.where(x > 0, m.up(m.norm(x)), x))


# reduces


@case(gauge_rules.reduces, "up fc fc2")
def pooled_over_tokens(m: Any, x: Tensor) -> Tensor:
    u = m.up(m.norm(x))
    return m.fc(u.mean(1)) + m.fc2(u.sum(-2, keepdim=True).sum((0, 1)))


@case(gauge_rules.reduces, "up", fc=COARSE)
def summed_over_channels(m: Any, x: Tensor) -> Tensor:
    """Exact with one scale for all channels, and refused as too coarse."""
    u = m.up(m.norm(x))
    return m.fc(u) * (u.sum(-1, keepdim=True) > 0)


@case(gauge_rules.reduces, "up low", fc=COARSE)
def summed_in_pairs_of_channels(m: Any, x: Tensor) -> Tensor:
    u = m.up(m.norm(x))
    return m.low(u.view(2, 3, HALF, 2).sum(-1)) + m.fc(torch.tanh(x) * m.scalar)


@case(gauge_rules.reduces, "up", fc="returned from the model")
def the_sum_of_everything(m: Any, x: Tensor) -> Any:
    """The total has no dimension left; summing it once more is legal."""
    u = m.up(m.norm(x))
    return m.fc(u), u.sum().sum(0)


# scatters


@case(gauge_rules.scatters, "up gate fc")
def written_token_by_token(m: Any, x: Tensor) -> Tensor:
    """RWKV: a loop fills a tensor of zeros."""
    u, g, y = m.up(m.norm(x)), m.gate(m.norm(x)), torch.zeros_like(x)
    for t in range(3):
        y[:, t] = (u * torch.sigmoid(x))[:, t] if t else g[:, t]
    return m.fc(y)


@case(gauge_rules.scatters, "up", fc="differs between tokens")
def partly_overwritten_with_plain_values(m: Any, x: Tensor) -> Tensor:
    u = m.up(m.norm(x)).clone()
    u[:, 1:] = x[:, 1:]
    return m.fc(u)


@case(gauge_rules.scatters, "up", dynamic=True, gate=PINNED, fc="no scale passes through, slice_scatter")
def overwritten_up_to_a_symbolic_place(m: Any, x: Tensor) -> Tensor:
    u = m.up(m.norm(x)).clone()
    u[:, : x.shape[1] - 1] = m.gate(x)[:, 1:]
    return m.fc(u)


# overwrites


@case(gauge_rules.overwrites, "up fc")
def a_buffer_that_is_overwritten(m: Any, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:] = m.up(m.norm(x))
    return m.fc(y)


# contracts


@case(gauge_rules.batched, "q k up fc")
def attention_written_out(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    return m.fc(torch.softmax(m.q(h) @ m.k(h).transpose(1, 2), -1) @ m.up(h))


@case(gauge_rules.batched, "up fc")
def tokens_mixed_from_the_right(m: Any, x: Tensor) -> Tensor:
    """(V·s)ᵀ·P with P not scaled: the mirror image."""
    mixed = m.up(m.norm(x)).transpose(1, 2) @ torch.softmax(x @ x.transpose(1, 2), -1)
    return m.fc(mixed.transpose(1, 2))


@case(gauge_rules.contracts, "up fc")
def tokens_of_one_sentence_mixed(m: Any, x: Tensor) -> Tensor:
    return m.fc(torch.mm(torch.softmax(x[0] @ x[0].t(), -1), m.up(m.norm(x[0]))))


@case(gauge_rules.batched, "up gate", fc="bmm")
def a_matrix_product_of_two_scaled_values(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    return m.fc(m.gate(h).transpose(1, 2) @ m.up(h))


@case(gauge_rules.batched, "up", fc=COARSE)
def channels_mixed_by_an_activation(m: Any, x: Tensor) -> Tensor:
    u = m.up(m.norm(x))
    return m.fc(u @ (x.transpose(1, 2) @ x))


# linear


@case(gauge_rules.linear, "q k up gate fc")
def a_chain_of_linears(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.gate(m.up(m.k(m.q(m.norm(x))))))


@case(gauge_rules.linear, "up fc")
def one_weight_used_twice(m: Any, x: Tensor) -> Tensor:
    """Each use reads a scaled copy of its own."""
    return m.fc(torch.relu(m.up(torch.relu(m.up(m.norm(x))))))


@case(gauge_rules.linear, "up fc")
def a_weight_and_its_transpose(m: Any, x: Tensor) -> Tensor:
    return m.fc(torch.relu(torch.relu(m.up(m.norm(x))) @ m.up.weight))


@case(gauge_rules.linear, "bank fc")
def a_weight_computed_from_parameters(m: Any, x: Tensor) -> Tensor:
    weight = m.matrix + m.bank @ m.bank.t()
    return m.fc(torch.relu(F.linear(m.norm(x), weight, 2 * m.vector)))


@case(gauge_rules.linear, "up bank")
def rows_of_one_parameter(m: Any, x: Tensor) -> Tensor:
    u = torch.cat([m.up(m.norm(x)), m.norm(x)], -1)
    return F.linear(u, m.bank[:HALF]) * F.linear(u, m.bank[HALF:])


@case(gauge_rules.linear, "up", fc="add")
def a_bias_computed_from_activations(m: Any, x: Tensor) -> Tensor:
    return m.fc(F.linear(m.norm(x), m.up.weight, x.sum((0, 1))))


@case(gauge_rules.linear, "up fc", matrix="passes through it")
def tokens_mixed_by_a_parameter(m: Any, x: Tensor) -> Tensor:
    return m.fc(torch.mm(m.matrix[:4, :3], m.up(m.norm(x[0]))))


@case(gauge_rules.linear, "up tokens", fc="passes through it")
def tokens_mixed_by_a_linear_with_a_bias(m: Any, x: Tensor) -> Tensor:
    """The bias would need every channel's scale at once, so the channels share one, and the outputs have their own."""
    return m.fc(m.tokens(m.up(m.norm(x)).transpose(1, 2).contiguous()).transpose(1, 2))


@case(gauge_rules.linear, "fc fc2")
def a_norm_applied_twice(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.norm(x)) + m.fc2(m.norm(x + 1))


# normalizes


@case(gauge_rules.normalizes)
def layer_norm_with_gain_and_bias(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.norm(x))


@case(gauge_rules.normalizes)
def layer_norm_without_bias(m: Any, x: Tensor) -> Tensor:
    return m.fc(F.layer_norm(x, [K], m.vector))


@case(gauge_rules.normalizes, "", fc=PINNED)
def layer_norm_without_parameters(m: Any, x: Tensor) -> Tensor:
    return m.fc(F.layer_norm(x, [K]))


@case(gauge_rules.normalizes)
def layer_norm_whose_gain_is_its_bias(m: Any, x: Tensor) -> Tensor:
    return m.fc(F.layer_norm(x, [K], m.vector, m.vector))


@case(gauge_rules.normalizes)
def layer_norm_over_tokens_and_channels(m: Any, x: Tensor) -> Tensor:
    return m.fc(F.layer_norm(x[:, :2], [2, K], m.prefix[0], m.prefix[1]))


@case(gauge_rules.normalizes, "", fc=PINNED)
def layer_norm_with_a_computed_gain(m: Any, x: Tensor) -> Tensor:
    return m.fc(F.layer_norm(x, [K], x.sum((0, 1)), m.vector))


@case(gauge_rules.normalizes, "up fc2", fc="normalized")
def a_norm_after_a_linear(m: Any, x: Tensor) -> Tensor:
    u = m.up(m.norm(x))
    return m.fc(u) + m.fc2(m.norm2(u))


# attends


def heads(y: Tensor, count: int) -> Tensor:
    return y.reshape(2, 3, count, -1).transpose(1, 2)


def joined(y: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(2, 3, -1)


@case(gauge_rules.attends, "q k up fc")
def attention(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    y = F.scaled_dot_product_attention(heads(m.q(h), 4), heads(m.k(h), 4), heads(m.up(h), 4), is_causal=True)
    return m.fc(joined(y))


@case(gauge_rules.attends, "q k up fc")
def attention_with_a_mask(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    mask = heads(x, 4).sum(-1, keepdim=True) + torch.zeros(3)
    y = F.scaled_dot_product_attention(heads(m.q(h), 4), heads(m.k(h), 4), heads(m.up(h), 4), attn_mask=mask)
    return m.fc(joined(y))


@case(gauge_rules.attends, "k up", fc="used in the attention scores")
def queries_with_a_second_reader(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    q = m.up(h)
    return m.fc(q) + joined(F.scaled_dot_product_attention(heads(q, 4), heads(m.k(h), 4), heads(x, 4)))[..., :5]


@case(gauge_rules.attends, "up wide")
def grouped_queries_by_repeating(m: Any, x: Tensor) -> Tensor:
    v = heads(m.up(m.norm(x)), 4).repeat_interleave(2, 1)
    q = heads(torch.cat([x, x], -1), 8)
    return m.wide(joined(F.scaled_dot_product_attention(q, q, v)))


@case(gauge_rules.attends, "up wide")
def grouped_queries_natively(m: Any, x: Tensor) -> Tensor:
    v, k = heads(m.up(m.norm(x)), 4), heads(x, 4)
    q = heads(torch.cat([x, x], -1), 8)
    return m.wide(joined(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))


@case(gauge_rules.attends, "low", fc=COARSE)
def one_value_head_for_all_queries(m: Any, x: Tensor) -> Tensor:
    """Multi-query attention: one channel serves 16 heads. Exact, and refused as too coarse."""
    v = (m.low(m.norm(x)[..., :HALF])[..., :1]).reshape(2, 1, 3, 1)
    q = heads(x, K)
    return m.fc(joined(F.scaled_dot_product_attention(q, q, v.expand(2, K, 3, 1))))


# gathers


@case(gauge_rules.gathers, "up fc")
def tokens_chosen_at_run_time(m: Any, x: Tensor) -> Tensor:
    chosen = x.sum(-1).argsort(-1)[0]
    return m.fc(m.up(m.norm(x))[:, chosen])


@case(gauge_rules.gathers, "up fc")
def tokens_chosen_in_two_dimensions(m: Any, x: Tensor) -> Tensor:
    chosen = x.sum(-1).argsort(-1)
    return m.fc(m.up(m.norm(x))[torch.arange(2)[:, None], chosen])


@case(gauge_rules.gathers, "up", fc=COARSE)
def channels_chosen_at_run_time(m: Any, x: Tensor) -> Tensor:
    chosen = x.sum((0, 1)).argsort()
    return m.fc(m.up(m.norm(x))[..., chosen])


@case(gauge_rules.gathers, "up fc")
def heads_chosen_at_run_time(m: Any, x: Tensor) -> Tensor:
    """Any head may come to stand anywhere, so they all share the scales of one."""
    chosen = x[0, 0, :2].argsort(descending=True)
    return m.fc(m.up(m.norm(x)).view(2, 3, 2, HALF)[:, :, chosen].flatten(2))


@case(gauge_rules.gathers, "qkv fc")
def packed_qkv_by_constant_index(m: Any, x: Tensor) -> Tensor:
    """Falcon: the value heads stand behind those of queries and keys."""
    qkv = m.qkv(m.norm(x)).view(2, 3, 3, K)
    return m.fc(qkv[:, :, [-1]].flatten(2)) + torch.softmax(qkv[:, :, [1, 0]], -1).sum(2)[..., :5]


@functools.cache
def capture(name: str) -> Captured:
    case = CASES[name]
    return captured(randomized(model(case.body)), example(), dynamic=case.dynamic)


@pytest.mark.parametrize("name", CASES)
def test_the_identity_holds(name: str) -> None:
    case, found = CASES[name], smoothed(capture(name), Smooth(absorb=False))
    targets = {node.target for node in found.gm.graph.nodes}
    assert any(gauge_rules.RULES.get(target, gauge_rules.pin_all) is case.rule for target in targets)
    found.assert_exact()
    assert found.folded == case.folds
    assert set(found.unfolded) == set(case.unfolded)
    for linear, reason in case.unfolded.items():
        assert reason in found.unfolded[linear]


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fold_is_absorbed(name: str) -> None:
    found = smoothed(capture(name), Smooth())
    assert not found.unfolded
    found.assert_exact()


def test_every_rule_has_a_case() -> None:
    rules = {*gauge_rules.RULES.values(), gauge_rules.pin_all}
    elsewhere = {gauge_rules.reads_shape, gauge_rules.grouped}  # below, and in test_gauge_products.py
    assert {case.rule for case in CASES.values()} == rules - elsewhere


def test_reading_a_size_scales_nothing() -> None:
    """Capture takes sizes from graph inputs; other front ends ask a tensor."""
    subject = captured(randomized(model(relu)), example(), dynamic=True)
    graph = subject.graph.graph
    (product,) = graph.find_nodes(op="call_function", target=aten.relu.default)
    tokens = product.meta["val"].shape[1]
    (given,) = [node for node in graph.find_nodes(op="placeholder") if str(node.meta["val"]) == str(tokens)]
    with graph.inserting_after(product):
        size = graph.call_function(aten.sym_size.int, (product, 1))
    size.meta["val"] = tokens
    assert given.replace_all_uses_with(size, lambda user: user > product)
    found = smoothed(subject, Smooth(absorb=False))
    assert found.folded == {"up", "fc"}
    found.assert_exact()


def test_a_fused_rms_norm_has_a_gain() -> None:
    """Capture keeps it whole on devices that have a kernel for it."""
    subject = captured(randomized(model(layer_norm_without_bias)), example())
    graph = subject.graph.graph
    (norm,) = graph.find_nodes(op="call_function", target=aten.native_layer_norm.default)
    x, width, gain, _, epsilon = norm.args
    norm.target, norm.args = aten._fused_rms_norm.default, (x, width, gain, epsilon)
    norm.meta["val"] = norm.meta["val"][:2]
    found = smoothed(subject, Smooth(absorb=False))
    assert found.folded == {"fc"}
    found.assert_exact()
