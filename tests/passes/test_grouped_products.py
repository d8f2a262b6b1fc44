"""Experts in every spelling become one operator; what is no such product stays as it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (defines its operator)
from graphs import captured
from probe import Body
from tolerances import assert_close, row_for
from torch import Tensor, nn
from torch.fx import Interpreter

from qcompile.grouped_ops import grouped_linear
from qcompile.passes.grouped_products import rewrite_grouped
from qcompile.rewrite import Rewriter, args_of, copy_graph

aten = torch.ops.aten
EXPERTS, K, N = 3, 16, 24
ENDS = torch.tensor([2, 2, 7], dtype=torch.int32)


def torch_transposed(m: Any, x: Tensor) -> Any:
    return torch._grouped_mm(x, m.up.transpose(-2, -1), offs=m.ends)


def torch_as_stored(m: Any, x: Tensor) -> Any:
    return torch._grouped_mm(x, m.down, offs=m.ends)


def transformers_transposed(m: Any, x: Tensor) -> Any:
    return torch.ops.transformers.grouped_mm_fallback(x, m.up.transpose(1, 2), m.ends)


def transformers_permuted(m: Any, x: Tensor) -> Any:
    return torch.ops.transformers.grouped_mm_fallback(x, weight=m.up.permute(0, 2, 1), offs=m.ends)


def transformers_turned(m: Any, x: Tensor) -> Any:
    """A stack whose experts are another dimension: no exchange of rows and columns."""
    return torch.ops.transformers.grouped_mm_fallback(x, m.turned.transpose(0, 1), m.ends)


def graph(body: Callable[..., Any], dtype: torch.dtype) -> Any:
    model = Body(
        body,
        up=nn.Parameter(torch.randn(EXPERTS, N, K)),
        down=nn.Parameter(torch.randn(EXPERTS, K, N)),
        turned=nn.Parameter(torch.randn(K, EXPERTS, N)),
        ends=nn.Buffer(ENDS),
    )
    return captured(model.to(dtype), torch.randn(7, K, dtype=dtype))


@pytest.mark.parametrize(("body", "transposes"), [
    (torch_transposed, 0), (torch_as_stored, 1), (transformers_transposed, 0), (transformers_permuted, 0),
    (transformers_turned, 2),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_every_spelling_becomes_one(body: Callable[..., Any], transposes: int) -> None:
    subject = graph(body, torch.bfloat16 if body in (torch_transposed, torch_as_stored) else torch.float32)
    gm = copy_graph(subject.graph)
    rewriter = Rewriter(gm, "test")
    rewrite_grouped(rewriter)
    gm.recompile()
    gm.graph.eliminate_dead_code()
    (node,) = gm.graph.find_nodes(op="call_function", target=grouped_linear)
    assert tuple(args_of(node)[1].meta["val"].shape) == (EXPERTS, N, K)
    assert node.meta["origin"].by == "test"
    found = [n for n in gm.graph.nodes if n.target in (aten.transpose.int, aten.permute.default)]
    assert len(found) == transposes
    with torch.no_grad():
        (expected,), (actual,) = (Interpreter(one).run(*subject.args) for one in (subject.graph, gm))
    assert_close(row_for("rewrite", expected.dtype), actual=actual, expected=expected)
    changes = rewriter.changes
    rewrite_grouped(rewriter)
    assert rewriter.changes == changes


def activations(m: Any, x: Tensor) -> Any:
    matrices = x.expand(EXPERTS, *x.shape) * m.up.sum()
    return torch._grouped_mm(x, matrices.transpose(-2, -1), offs=m.ends)


def no_offsets(m: Any, x: Tensor) -> Any:
    return torch._grouped_mm(x.expand(EXPERTS, *x.shape), m.up.transpose(-2, -1))


def columns(m: Any, x: Tensor) -> Any:
    """Both operands 2-D: groups along what is summed."""
    return torch._grouped_mm(x.t(), m.up[0, :7].contiguous(), offs=m.ends)


def another_dtype(m: Any, x: Tensor) -> Any:
    return torch._grouped_mm(x, m.up.transpose(-2, -1), offs=m.ends, out_dtype=torch.bfloat16)


@pytest.mark.parametrize("body", [activations, no_offsets, columns, another_dtype])
def test_others_stay(body: Callable[..., Any]) -> None:
    subject = graph(body, torch.bfloat16)
    gm = copy_graph(subject.graph)
    rewriter = Rewriter(gm, "test")
    rewrite_grouped(rewriter)
    assert rewriter.changes == 0
    assert gm.graph.find_nodes(op="call_function", target=aten._grouped_mm.default)
