"""Attention on NVIDIA GPUs: which calls the kernel gets, how keys are cut up, and how the parts are put together."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.lowering import attention_cuda
from qcompile.lowering.attention_cuda import choose_block, choose_parts, choose_warps, combine, rounded, takes
from qcompile.lowering.target import Target

H200 = Target("cuda", 90)
KERNEL = "qcompile_triton::attention"


def operands(
    queries: int = 1, heads: int = 8, groups: int = 2, channels: int = 16, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    key = torch.randn(3, groups, 50, channels).to(dtype)
    return torch.randn(3, heads, queries, channels).to(dtype), key, key.flip(0)


def calls_kernel(target: Target, *inputs: Any, causal: bool = False, masked: bool = True) -> bool:
    """Whether tracing one call meets the kernel's operator."""
    inputs = (*inputs, torch.ones(3, 1, 1, 50, dtype=torch.bool)) if masked else inputs
    from torch.fx.experimental.proxy_tensor import make_fx

    def call(*tensors: Tensor) -> Any:
        query, key, value, *mask = tensors
        return attention_cuda.attention(target, query, key, value, mask[0] if mask else None, causal, 0.3)

    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in inputs]
        if call(*fakes) is None:
            return False
        gm = make_fx(call)(*fakes)
    return any(KERNEL.replace("::", ".") in str(node.target) for node in gm.graph.nodes)


def test_one_query_goes_to_the_kernel() -> None:
    pytest.importorskip("triton")
    assert calls_kernel(H200, *operands())
    assert calls_kernel(Target("cuda", 80), *operands(dtype=torch.float32))
    assert not calls_kernel(Target("cuda", 75), *operands())
    assert not calls_kernel(H200, *operands(queries=2))
    assert not calls_kernel(H200, *operands(), causal=True)
    assert not calls_kernel(H200, *operands(dtype=torch.float64))
    assert not calls_kernel(H200, *operands(), masked=False), "torch's flash kernel takes that"
    assert calls_kernel(H200, *operands(dtype=torch.float32), masked=False)


def test_without_triton_torch_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cuda, "not_installed", lambda: "needs Triton")
    assert not calls_kernel(H200, *operands())


@pytest.mark.parametrize(("changed", "reason"), [
    ({"dtype": torch.float64}, "float64"), ({"heads": 256, "groups": 1, "channels": 128}, "256 heads"), ({}, ""),
    ({"heads": 64, "groups": 1, "channels": 256, "dtype": torch.float32}, "64 heads of 256 channels, torch.float32"),
    ({"heads": 71, "groups": 1, "channels": 64}, ""), ({"heads": 64, "groups": 1, "channels": 256}, ""),
])  # fmt: skip
def test_refusals(changed: dict[str, Any], reason: str) -> None:
    found = takes(*operands(**changed))
    assert reason in found
    assert bool(found) == bool(reason)


def test_blocks() -> None:
    assert [rounded(size) for size in (1, 16, 17, 64, 80, 256)] == [16, 16, 32, 64, 128, 256]
    assert [choose_block(*sizes) for sizes in ((16, 256), (16, 128), (16, 1024), (128, 128), (16, 4096))] == [
        64, 128, 16, 32, 16,
    ]  # fmt: skip
    assert [choose_warps(*sizes) for sizes in ((16, 128), (64, 64), (64, 128))] == [4, 4, 8]


@pytest.mark.parametrize(("programs", "keys", "parts"), [
    (8, 64, 1), (8, 128, 2), (8, 512, 4), (8, 2048, 4), (8, 4096, 8), (8, 32768, 32), (256, 512, 2), (264, 512, 1),
    (64, 512, 4), (1, 10**6, 32),
])  # fmt: skip
def test_every_multiprocessor_gets_a_part(programs: int, keys: int, parts: int) -> None:
    assert choose_parts(programs, keys, H200) == parts
    assert choose_parts(programs, keys, Target("cuda", 90, processors=1)) <= 2


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_parts_are_put_together(parts: int) -> None:
    """As the softmax of all scores; a part that saw nothing counts for nothing; a query that did, reads zeros."""
    torch.manual_seed(parts)
    scores, values = torch.randn(parts, 6, 3, 5, dtype=torch.float64) * 50, torch.randn(parts, 6, 3, 5, 7).double()
    scores[-1, 1] = -torch.inf
    scores[:, 2, 0] = -torch.inf
    natural = scores * 0.6931471805599453
    out = torch.einsum("pbhs,pbhsv->pbhv", torch.softmax(natural, -1).nan_to_num(0.0), values)
    size = (torch.logsumexp(natural, -1) / 0.6931471805599453).clamp(min=-1e30)
    y = combine(out.float(), size.float())
    share = torch.softmax(natural.permute(1, 2, 0, 3).flatten(2), -1).nan_to_num(0.0)
    expected = torch.einsum("bhs,bhsv->bhv", share, values.permute(1, 2, 0, 3, 4).flatten(2, 3))
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    assert not y[2, 0].any()
