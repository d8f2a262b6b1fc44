"""Cases of rules about products, norms and attention."""

from typing import Any

import torch
from gauge_cases.cases import COARSE, HALF, PINNED, K, case
from torch import Tensor
from torch.nn import functional as F

from qcompile.passes import gauge_rules

aten = torch.ops.aten


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
