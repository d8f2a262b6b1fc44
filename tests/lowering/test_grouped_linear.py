"""Experts in float: torch's own product in bfloat16, which Inductor knows, the dialect's operator in other dtypes."""

import pytest
import torch
from tolerances import assert_close, row_for
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile import grouped_ops
from qcompile.lowering.grouped_linear import grouped_linear

OFFSETS = torch.tensor([2, 2, 7], dtype=torch.int32)


@pytest.mark.parametrize(("dtype", "target"), [
    (torch.bfloat16, torch.ops.aten._grouped_mm.default), (torch.float32, grouped_ops.grouped_linear),
    (torch.float16, grouped_ops.grouped_linear),
])  # fmt: skip
def test_what_it_becomes(dtype: torch.dtype, target: torch._ops.OpOverload) -> None:
    x, weight = torch.randn(7, 16, dtype=dtype), torch.randn(3, 24, 16, dtype=dtype)
    traced = make_fx(grouped_linear)(x, weight, OFFSETS)
    assert [node.target for node in traced.graph.nodes if node.target == target] == [target]
    expected = grouped_ops.grouped_linear(x, weight, OFFSETS)
    assert_close(row_for("rewrite", dtype), actual=grouped_linear(x, weight, OFFSETS), expected=expected)
