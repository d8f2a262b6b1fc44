"""Cases of rules about what happens to each value on its own."""

from typing import Any

import torch
from gauge_cases.cases import COARSE, HALF, K, case
from torch import Tensor
from torch.nn import functional as F

from qcompile.passes import gauge_rules

aten = torch.ops.aten


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
