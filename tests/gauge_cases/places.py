"""Cases of rules about where values lie."""

from typing import Any

import torch
from gauge_cases.cases import COARSE, HALF, PINNED, K, case
from torch import Tensor
from torch.nn import functional as F

from qcompile.passes import gauge_rules

aten = torch.ops.aten


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
