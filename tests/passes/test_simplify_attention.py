"""Masks that sizes alone decide, keys that were repeated for shared heads; and everything that must stay as it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import apply, captured, count
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.functional import scaled_dot_product_attention

from qcompile import ops
from qcompile.captured import Captured
from qcompile.passes import simplify_attention
from qcompile.passes.eliminate_dead import EliminateDead
from qcompile.passes.simplify_attention import OPERATORS, SimplifyAttention
from qcompile.rewrite import Rewriter, args_of, copy_graph, operands_of
from qcompile.verify import Verify

aten = torch.ops.aten


class Attend(nn.Module):
    """x [B, L, H·8] attends to itself. mask: of the length; shares: query heads per key head."""

    def __init__(self, mask: Callable[[int], Tensor] | None = None, shares: int = 1, **keywords: Any) -> None:
        super().__init__()
        self.mask, self.shares, self.keywords = mask, shares, keywords

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        query = x.unflatten(-1, (-1, 8)).transpose(1, 2)
        key = query[:, :: self.shares]
        if self.shares > 1:
            key = key[:, :, None].expand(-1, -1, self.shares, -1, -1).reshape(query.shape)
        mask = given if self.mask is None else self.mask(x.shape[1])
        y = scaled_dot_product_attention(query, key, key, attn_mask=mask, **self.keywords)
        return y.transpose(1, 2).flatten(2)


def position(length: int) -> Tensor:
    return torch.arange(length)


def causal(length: int) -> Tensor:
    return position(length)[:, None] >= position(length)


def packed(length: int) -> Tensor:
    """As transformers build it: one sequence, found by comparing positions, and batch and heads in front."""
    sequence = (torch.diff(position(length)[None], prepend=position(1)[None] - 1) != 1).cumsum(-1)
    return (causal(length)[None] & (sequence[:, :, None] == sequence[:, None]))[:, None]


def additive(length: int) -> Tensor:
    return torch.zeros(length, length).masked_fill(~causal(length), -torch.inf)


def simplified(model: nn.Module, *inputs: Tensor, dynamic: bool = False) -> tuple[Captured, GraphModule, Any]:
    """The graph after the pass, checked by the verifier, and against the graph before it."""
    one = captured(model, *inputs, dynamic=dynamic)
    gm, (result,) = apply(one, SimplifyAttention())
    verify = Verify(full=True)
    verify.start(one.graph)
    verify.stage = "quantized"
    verify.check(gm)
    with torch.no_grad():
        torch.testing.assert_close(gm(*one.args), one.graph(*one.args), rtol=1e-5, atol=1e-6)
    again = copy_graph(gm)
    assert SimplifyAttention().run(again).changes == 0
    return one, gm, result


def only(gm: GraphModule) -> Node:
    (node,) = gm.graph.find_nodes(op="call_function", target=ops.attention)
    return node


@pytest.mark.parametrize("mask", [causal, packed, additive, lambda n: causal(n)[None, None]])
@pytest.mark.parametrize("length", [2, 7])
def test_a_mask_that_hides_the_future_is_is_causal(mask: Callable[[int], Tensor], length: int) -> None:
    _, gm, _ = simplified(Attend(mask), torch.randn(2, length, 16))
    assert only(gm).args[3:5] == (None, True)
    EliminateDead().run(gm)
    assert not [node for node in gm.graph.nodes if "arange" in str(node.target) or "iota" in str(node.target)]


@pytest.mark.parametrize("mask", [lambda n: torch.ones(n, n, dtype=torch.bool), lambda n: torch.zeros(1, n)])
def test_a_mask_that_hides_nothing_goes(mask: Callable[[int], Tensor]) -> None:
    _, gm, _ = simplified(Attend(mask), torch.randn(2, 7, 16))
    assert only(gm).args[3:5] == (None, False)


OTHERS: dict[str, Callable[[int], Tensor]] = {
    "the past": lambda n: causal(n).T,
    "a window": lambda n: causal(n) & (position(n)[:, None] - position(n) < 3),
    "the future too, at one place": lambda n: causal(n) | (position(n) == n - 1)[None],
    "not itself": lambda n: position(n)[:, None] > position(n) - (position(n) == 0).long(),
    "distances": lambda n: additive(n) - (position(n)[:, None] - position(n)).float() / 8,
    "a large number": lambda n: torch.zeros(n, n).masked_fill(~causal(n), -1e4),
    "one row for all": lambda n: (position(n) < 3)[None],
    "a vector for all": lambda n: (position(n) < 3).expand(n, n),
    "one column for all": lambda n: (position(n) < 3)[:, None],
}


@pytest.mark.parametrize("mask", OTHERS)
def test_other_masks_stay(mask: str) -> None:
    _, gm, _ = simplified(Attend(OTHERS[mask]), torch.randn(2, 7, 16))
    assert only(gm).args[3] is not None
    assert only(gm).args[4] is False


def test_a_mask_that_is_given_stays() -> None:
    """And 0 and −∞ made of it become the condition again."""
    _, gm, _ = simplified(Attend(), torch.randn(2, 7, 16), causal(7))
    mask = args_of(only(gm))[3]
    assert mask.meta["val"].dtype == torch.bool
    _, gm, _ = simplified(Attend(), torch.randn(2, 7, 16), additive(7))
    assert args_of(only(gm))[3].op == "placeholder"


def test_layers_share_a_mask() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            mask = causal(7) & seen
            return Attend()(Attend()(x, mask), mask)

    _, gm, _ = simplified(Twice(), torch.randn(2, 7, 16), torch.ones(7, dtype=torch.bool))
    first, second = gm.graph.find_nodes(op="call_function", target=ops.attention)
    assert first.args[3] is second.args[3]


def test_symbolic_lengths_keep_their_mask() -> None:
    _, gm, _ = simplified(Attend(causal), torch.randn(2, 7, 16), dynamic=True)
    assert only(gm).args[3] is not None


def test_large_masks_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplify_attention, "LARGEST", 48)
    _, gm, _ = simplified(Attend(causal), torch.randn(2, 7, 16))
    assert only(gm).args[3] is not None


def test_random_masks_are_not_computed() -> None:
    one = captured(Attend(lambda n: torch.rand(n, n) >= 0), torch.randn(2, 7, 16))
    gm, _ = apply(one, SimplifyAttention())
    assert only(gm).args[3] is not None


@pytest.mark.parametrize("shares", [2, 4])
@pytest.mark.parametrize("mask", [None, causal])
def test_repeated_keys_are_read_where_they_are(shares: int, mask: Callable[[int], Tensor] | None) -> None:
    _, gm, _ = simplified(Attend(mask, shares), torch.randn(2, 7, 64))
    heads = [operand.meta["val"].shape[1] for operand in operands_of(only(gm))[:3]]
    assert heads == [8, 8 // shares, 8 // shares]


def test_keys_that_only_look_repeated_stay() -> None:
    class Interleaved(nn.Module):
        """The groups are repeated as a whole: head h reads key h mod G."""

        def forward(self, x: Tensor) -> Tensor:
            query = x.unflatten(-1, (-1, 8)).transpose(1, 2)
            key = query[:, :2][:, None].expand(-1, 2, -1, -1, -1).reshape(query.shape)
            return scaled_dot_product_attention(query, key, key).transpose(1, 2).flatten(2)

    class Uneven(nn.Module):
        """Keys are shared by two heads, values by none."""

        def forward(self, x: Tensor) -> Tensor:
            query = x.unflatten(-1, (-1, 8)).transpose(1, 2)
            key = query[:, ::2, None].expand(-1, -1, 2, -1, -1).reshape(query.shape)
            return scaled_dot_product_attention(query, key, query).transpose(1, 2).flatten(2)

    class Apart(nn.Module):
        """Keys are shared by four heads, values by two."""

        def forward(self, x: Tensor) -> Tensor:
            query = x.unflatten(-1, (-1, 8)).transpose(1, 2)
            key = query[:, :1, None].expand(-1, -1, 4, -1, -1).reshape(query.shape)
            value = query[:, :2, None].expand(-1, -1, 2, -1, -1).reshape(query.shape)
            return scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    for model in (Interleaved(), Uneven(), Apart()):
        _, gm, _ = simplified(model, torch.randn(2, 7, 32))
        assert args_of(only(gm))[1].meta["val"].shape[1] == 4


@pytest.mark.parametrize("dimensions", [4, 6])
def test_keys_repeated_in_other_dimensions_stay(dimensions: int) -> None:
    class Other(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            if dimensions == 4:  # keys without a batch
                k = q[0, :2].unsqueeze(1).expand(-1, 2, -1, -1).reshape(1, 4, 7, 8)
            else:  # two dimensions of heads
                k = q[:, :2][:, None].unsqueeze(3).expand(-1, -1, -1, 2, -1, -1).reshape(1, 4, 7, 8)
            return scaled_dot_product_attention(q, k, k)

    _, gm, _ = simplified(Other(), torch.randn(1, 4, 7, 8))
    assert args_of(only(gm))[1].meta["val"].shape[1] == 4


def test_repeated_keys_of_symbolic_length_are_found_too() -> None:
    x = torch.randn(2, 7, 64)
    torch._dynamo.mark_dynamic(x, 1)
    _, gm, _ = simplified(Attend(None, 2), x)
    assert not isinstance(operands_of(only(gm))[1].meta["val"].shape[2], int)
    assert [operand.meta["val"].shape[1] for operand in operands_of(only(gm))[:3]] == [8, 4, 4]


@pytest.mark.parametrize(("queries", "keys"), [(3, 9), (9, 3)])
def test_keys_that_no_query_sees_are_cut_off(queries: int, keys: int) -> None:
    """A prompt in a static cache that is longer."""

    class Prompt(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, k, attn_mask=torch.ones(queries, keys, dtype=torch.bool).tril())

    _, gm, _ = simplified(Prompt(), torch.randn(1, 2, queries, 8), torch.randn(1, 2, keys, 8))
    assert args_of(only(gm))[4] is True
    assert [operand.meta["val"].shape[2] for operand in operands_of(only(gm))[1:3]] == [min(queries, keys)] * 2


def test_a_mask_that_was_made_elsewhere_is_computed() -> None:
    """ones(L, L).tril().to(device): the device is an argument like any other."""
    one = captured(Attend(causal), torch.randn(2, 7, 16))
    gm = copy_graph(one.graph)
    (made,) = gm.graph.find_nodes(op="call_function", target=aten.ge.Tensor)
    rewriter, readers = Rewriter(gm, "test"), list(made.users)
    move = torch.ops.prims.device_put.default
    moved = rewriter.emit(move, (made, torch.device("cpu")), before=made.next, of=made, name="moved")
    for reader in readers:
        rewriter.set_input(reader, made, moved)
    moved.args = (made, torch.device("cuda"))  # as it would be there
    SimplifyAttention().run(gm)
    assert only(gm).args[3:5] == (None, True)


def test_the_scale_is_said() -> None:
    _, gm, _ = simplified(Attend(), torch.randn(2, 7, 16))
    assert only(gm).args[5] is None
    _, gm, _ = simplified(Attend(scale=0.3), torch.randn(2, 7, 16))
    assert only(gm).args[5] == 0.3


@pytest.mark.parametrize("transposed", [False, True])
def test_the_layout_of_the_result_stays(transposed: bool) -> None:
    class Direct(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return scaled_dot_product_attention(x, x, x)

    x = torch.randn(2, 7, 3, 8).transpose(1, 2) if transposed else torch.randn(2, 3, 7, 8)
    _, gm, _ = simplified(Direct(), x)
    assert count(gm, aten.clone.default) == (not transposed)


class Called(nn.Module):
    """An operator of torch's, whatever device it is for, as it stands in a graph."""

    def __init__(self, index: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.index, self.dropout = index, dropout

    def forward(self, x: Tensor) -> Tensor:
        target = aten._scaled_dot_product_flash_attention_for_cpu.default
        found: Tensor = target(x, x, x, self.dropout)[self.index]
        return found


@pytest.mark.parametrize(("model", "reason"), [(Called(index=1), "more than the result"), (Called(), "")])
def test_what_cannot_be_said_is_refused(model: nn.Module, reason: str) -> None:
    gm, (result,) = apply(captured(model, torch.randn(1, 2, 3, 8)), SimplifyAttention())
    assert [refusal.reason[: len(reason)] for refusal in result.refusals] == [reason] * bool(reason)
    assert count(gm, ops.attention) == (not reason)


def renamed(target: Any, *rest: Any, scale: float | None = None) -> Node:
    """The pass's result for a call of another device's operator with its own order of arguments. "mask" among them is
    one that stays."""
    one = captured(Attend(lambda n: additive(n) - 1.0), torch.randn(2, 16, 16))
    gm = copy_graph(one.graph)
    (node,) = gm.graph.find_nodes(op="call_function", target=aten._scaled_dot_product_flash_attention_for_cpu.default)
    given = node.kwargs.get("attn_mask")
    node.args = (*args_of(node)[:3], *(given if value == "mask" else value for value in rest))
    node.kwargs = {} if scale is None else {"scale": scale}
    node.target = target
    SimplifyAttention().run(gm)
    return only(gm)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_operators_of_other_devices(causal: bool, scale: float | None) -> None:
    for target, arguments in (
        (aten._scaled_dot_product_flash_attention.default, (0.0, causal, False)),
        (aten._scaled_dot_product_efficient_attention.default, (None, False, 0.0, causal)),
        (aten._scaled_dot_product_cudnn_attention.default, (None, False, 0.0, causal, False)),
    ):
        node = renamed(target, *arguments, scale=scale)
        assert node.args[3:] == (None, causal, scale)
        assert target in OPERATORS
    for target, arguments in (
        (aten._scaled_dot_product_efficient_attention.default, ("mask", False, 0.0, False)),
        (aten._scaled_dot_product_cudnn_attention.default, ("mask", False, 0.0, False, False)),
    ):
        assert args_of(renamed(target, *arguments))[3].meta["val"].shape == (16, 16)


def for_cudnn(model: nn.Module, *inputs: Tensor, cudnn: bool = True) -> Node:
    """Attention as torch writes it where cuDNN computes it, after the pass."""
    gm = copy_graph(captured(model, *inputs).graph)
    (node,) = gm.graph.find_nodes(op="call_function", target=aten._scaled_dot_product_flash_attention_for_cpu.default)
    if cudnn:
        node.args = (*args_of(node)[:3], node.kwargs["attn_mask"], False, 0.0, False, False)
        node.kwargs, node.target = {}, simplify_attention.CUDNN
    SimplifyAttention().run(gm)
    return only(gm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_cudnn_is_given_for_a_mask_is_understood(dtype: torch.dtype) -> None:
    """torch 2.11 writes −65504 for False, in one order or the other; infinities and such numbers hide alike."""

    def seen_first(seen: Tensor) -> Tensor:
        return torch.where(seen, 0.0, torch.scalar_tensor(-65504.0, dtype=dtype))

    def hidden_first(seen: Tensor) -> Tensor:
        return torch.where(seen.logical_not(), -65504.0, torch.scalar_tensor(0.0, dtype=dtype))

    x = torch.randn(2, 7, 16, dtype=dtype)
    for written in (seen_first, hidden_first):
        computed = for_cudnn(Attend(lambda n, written=written: written(packed(n))), x)
        assert computed.args[3:5] == (None, True)
        elsewhere = for_cudnn(Attend(lambda n, written=written: written(causal(n))), x, cudnn=False)
        assert args_of(elsewhere)[3].meta["val"].dtype == dtype, "a number like any other"

    class Given(Attend):
        def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
            assert given is not None
            return super().forward(x, hidden_first(given))

    mask = args_of(for_cudnn(Given(), x, causal(7)))[3]
    # float16's own lowest number: where it hides every key of a query, it hides none.
    assert (mask.op == "placeholder") == (dtype != torch.float16)


def test_padding_of_a_mask_is_taken_off() -> None:
    """Memory-efficient attention's masks are wider in memory than what is read of them."""
    one = captured(Attend(), torch.randn(2, 7, 16), torch.randn(1, 1, 7, 7))
    cases = (9, 0, 0, 1), (0, 0, 0, 1), (9, 2, 2, 1), (9, 2, 0, 1), (9, 0, 2, 1), (7, 0, 0, 2)
    for behind, front, start, step in cases:
        gm = copy_graph(one.graph)
        (node,) = gm.graph.find_nodes(op="call_function", target=next(iter(OPERATORS)))
        mask, rewriter = node.kwargs["attn_mask"], Rewriter(gm, "test")
        assert isinstance(mask, Node)
        padded = rewriter.emit(
            aten.constant_pad_nd.default, (mask, [front, behind + 2]), before=node, of=mask, name="padded"
        )
        part = (padded, -1, start, start + 7 * step, step)
        cut = rewriter.emit(aten.slice.Tensor, part, before=node, of=mask, name="cut")
        wide = rewriter.emit(aten.expand.default, (cut, [2, 2, 7, 7]), before=node, of=mask, name="wide")
        node.kwargs = {**node.kwargs, "attn_mask": wide}
        SimplifyAttention().run(gm)
        assert (args_of(only(gm))[3] is mask) == (front == start == 0 and step == 1), "a mask that was moved is another"


def test_dropout_and_two_masks_are_refused() -> None:
    one = captured(Attend(), torch.randn(2, 7, 16), torch.randn(7, 7))
    for change, reason in (({"args": (0.1, False)}, "dropout"), ({"args": (0.0, True)}, "causal at once")):
        gm = copy_graph(one.graph)
        (node,) = gm.graph.find_nodes(op="call_function", target=next(iter(OPERATORS)))
        node.args = (*node.args[:3], *change["args"])
        (refusal,) = SimplifyAttention().run(gm).refusals
        assert reason in refusal.reason
        assert node.target in OPERATORS
