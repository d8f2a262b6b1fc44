"""Matrices gathered for each row become products of rows sorted by expert; what is no such product stays as it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import captured
from probe import Body
from tolerances import assert_close, row_for
from torch import Tensor, nn
from torch.fx import Interpreter

from qcompile.grouped_ops import grouped_linear
from qcompile.passes.gathered_products import rewrite_gathered
from qcompile.rewrite import Rewriter, args_of, copy_graph

aten = torch.ops.aten
EXPERTS, K, N = 5, 16, 24
ROWS = [3, 0, 3, -1, 1, 4, 3]  # unsorted, one that nobody has, one counted from the end


def from_left(m: Any, x: Tensor) -> Any:
    return torch.bmm(m.up[m.ids], x.unsqueeze(-1)).squeeze(-1)


def from_right(m: Any, x: Tensor) -> Any:
    return torch.bmm(x.unsqueeze(1), m.down[m.ids]).squeeze(1)


def from_right_transposed(m: Any, x: Tensor) -> Any:
    return torch.bmm(x.unsqueeze(1), m.up[m.ids].transpose(1, 2)).squeeze(1)


def from_left_transposed(m: Any, x: Tensor) -> Any:
    return torch.bmm(m.down[m.ids].permute(0, 2, 1), x.unsqueeze(-1)).squeeze(-1)


def of_a_transposed_stack(m: Any, x: Tensor) -> Any:
    return torch.bmm(m.down.transpose(1, 2)[m.ids], x.unsqueeze(-1)).squeeze(-1)


def short_ids(m: Any, x: Tensor) -> Any:
    return torch.bmm(m.up[m.ids.int()], x.unsqueeze(-1)).squeeze(-1)


def graph(body: Callable[..., Any], tokens: int = len(ROWS)) -> Any:
    model = Body(
        body,
        up=nn.Parameter(torch.randn(EXPERTS, N, K)),
        down=nn.Parameter(torch.randn(EXPERTS, K, N)),
        square=nn.Parameter(torch.randn(EXPERTS, K, K)),
    )
    ids = torch.tensor(ROWS[:tokens])

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, ids: Tensor) -> Any:
            self.model.ids = ids
            return self.model(x)

    return captured(Routed(), torch.randn(tokens, K), ids)


def rewritten(subject: Any) -> tuple[Any, Rewriter]:
    gm = copy_graph(subject.graph)
    rewriter = Rewriter(gm, "test")
    rewrite_gathered(rewriter)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm, rewriter


def assert_same(subject: Any, gm: Any) -> None:
    with torch.no_grad():
        expected, actual = (Interpreter(one).run(*subject.args) for one in (subject.graph, gm))
    for left, right in zip(expected, actual, strict=True):
        assert_close(row_for("rewrite", left.dtype), actual=right, expected=left)


@pytest.mark.parametrize("tokens", [1, len(ROWS)])
@pytest.mark.parametrize("body", [
    from_left, from_right, from_right_transposed, from_left_transposed, of_a_transposed_stack, short_ids,
])  # fmt: skip
def test_every_spelling_becomes_one(body: Callable[..., Any], tokens: int) -> None:
    subject = graph(body, tokens)
    gm, rewriter = rewritten(subject)
    (node,) = gm.graph.find_nodes(op="call_function", target=grouped_linear)
    assert tuple(args_of(node)[1].meta["val"].shape) == (EXPERTS, N, K)
    assert args_of(node)[2].meta["val"].dtype == torch.int32
    assert not gm.graph.find_nodes(op="call_function", target=aten.bmm.default)
    assert_same(subject, gm)
    changes = rewriter.changes
    rewrite_gathered(rewriter)
    assert rewriter.changes == changes


def two_stacks(m: Any, x: Tensor) -> Any:
    inner = torch.bmm(m.up[m.ids], x.unsqueeze(-1)).squeeze(-1).relu()
    return torch.bmm(inner.unsqueeze(1), m.up[m.ids]).squeeze(1)


def test_stacks_of_one_routing_sort_once() -> None:
    subject = graph(two_stacks)
    gm, _ = rewritten(subject)
    assert len(gm.graph.find_nodes(op="call_function", target=grouped_linear)) == 2
    assert len(gm.graph.find_nodes(op="call_function", target=aten.searchsorted.Tensor)) == 1
    assert_same(subject, gm)


def two_routings(m: Any, x: Tensor) -> Any:
    inner = torch.bmm(m.square[m.ids], x.unsqueeze(-1)).squeeze(-1)
    return torch.bmm(m.up[m.ids.flip(0)], inner.unsqueeze(-1)).squeeze(-1)


def test_two_routings_are_kept_apart() -> None:
    subject = graph(two_routings)
    gm, _ = rewritten(subject)
    assert len(gm.graph.find_nodes(op="call_function", target=aten.searchsorted.Tensor)) == 2
    assert_same(subject, gm)


def read_elsewhere(m: Any, x: Tensor) -> Any:
    matrices = m.up[m.ids]
    return torch.bmm(matrices, x.unsqueeze(-1)).squeeze(-1), matrices.sum(0)


def test_a_gather_with_other_readers_keeps_them() -> None:
    subject = graph(read_elsewhere)
    gm, _ = rewritten(subject)
    assert gm.graph.find_nodes(op="call_function", target=grouped_linear)
    assert_same(subject, gm)


def several_rows(m: Any, x: Tensor) -> Any:
    return torch.bmm(m.up[m.ids], x.unsqueeze(-1).expand(-1, -1, 3).contiguous())


def activations(m: Any, x: Tensor) -> Any:
    stack = m.up * x.sum()
    return torch.bmm(stack[m.ids], x.unsqueeze(-1))


def gathered_rows(m: Any, x: Tensor) -> Any:
    return torch.bmm(m.square[:, m.ids], x[:EXPERTS].unsqueeze(-1))


def gathered_twice(m: Any, x: Tensor) -> Any:
    """By two indices, of a stack with four dimensions."""
    return torch.bmm(m.square.view(EXPERTS, 4, 4, K)[m.ids, m.ids.abs() % 4], x.unsqueeze(-1))


@pytest.mark.parametrize("body", [several_rows, activations, gathered_rows, gathered_twice])
def test_others_stay(body: Callable[..., Any]) -> None:
    gm, rewriter = rewritten(graph(body))
    assert rewriter.changes == 0
    assert gm.graph.find_nodes(op="call_function", target=aten.bmm.default)
