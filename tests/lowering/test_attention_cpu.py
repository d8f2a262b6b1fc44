"""Attention on CPU: both forms compute what the flash kernel computes, under every kind of mask."""

from collections.abc import Callable

import pytest
import torch
from graphs import apply, captured
from tolerances import assert_close, row_for
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from qcompile.captured import Captured
from qcompile.lowering import attention_cpu, cpu_library
from qcompile.lowering.inductor import decompositions
from qcompile.lowering.lower import lower
from qcompile.lowering.target import Target, detect
from qcompile.passes.simplify_attention import SimplifyAttention

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
KERNEL = attention_cpu.KERNEL
HERE, PLAIN = detect(torch.device("cpu")), Target("cpu")
runs = not cpu_library.ATTENTION.runs_on(HERE)
runs_here = pytest.mark.skipif(not runs, reason=cpu_library.ATTENTION.runs_on(HERE))
Mask = Callable[[int], Tensor]


class Attend(nn.Module):
    """Attention of x [B, L, heads·8] to itself, under a mask that is computed from its length alone."""

    def __init__(
        self, mask: Mask | None = None, *, is_causal: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.mask, self.is_causal, self.dtype = mask, is_causal, dtype

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, 8)).transpose(1, 2)
        mask = None if self.mask is None else self.mask(x.shape[1])
        if mask is not None and mask.is_floating_point():
            mask = mask.to(self.dtype)
        y = scaled_dot_product_attention(heads, heads, heads, attn_mask=mask, is_causal=self.is_causal)
        return y.transpose(1, 2).flatten(2)


class Read(nn.Module):
    """Attention to a cache. groups: query heads per cached head, which the model repeats or leaves to the operator.
    scale: None is 1/√D."""

    def __init__(self, *, groups: int = 1, scale: float | None = None, repeat: bool = True) -> None:
        super().__init__()
        self.groups, self.scale, self.repeat = groups, scale, repeat

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.repeat:
            key, value = (x.repeat_interleave(self.groups, 1) for x in (key, value))
        grouped = self.groups > 1 and not self.repeat
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale, enable_gqa=grouped)


def lowered(
    model: nn.Module, *inputs: Tensor, dynamic: bool = False, target: Target = PLAIN
) -> tuple[Captured, torch.fx.GraphModule]:
    capture = captured(model, *inputs, dynamic=dynamic)
    gm, _ = apply(capture, SimplifyAttention())
    return capture, lower(gm, target, decompositions())[0]


def calls(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=ATTENTION))


def cache(batch: int, heads: int, length: int, dtype: torch.dtype, groups: int = 1) -> tuple[Tensor, ...]:
    torch.manual_seed(batch * length)
    key, value = torch.randn(2, batch, heads, length, 8, dtype=dtype)
    return torch.randn(batch, heads * groups, 1, 8, dtype=dtype), key, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "heads", "length", "groups"), [(1, 1, 1, 1), (3, 2, 7, 1), (2, 2, 65, 3)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_one_query_is_read_by_reductions(
    dtype: torch.dtype, batch: int, heads: int, length: int, groups: int, masked: bool, scale: float | None
) -> None:
    inputs: tuple[Tensor, ...] = cache(batch, heads, length, dtype, groups)
    if masked:
        mask = torch.randn(batch, 1, 1, length, dtype=dtype)
        mask[:, :, :, length // 2 + 1 :] = -torch.inf
        inputs = (*inputs, mask)
    capture, gm = lowered(Read(groups=groups, scale=scale), *inputs)
    assert calls(gm) == []
    exact = Read(groups=groups, scale=scale)(*(x.double() for x in inputs))
    assert_close(row_for("rewrite", dtype), actual=gm(*capture.args)[0].double(), expected=exact)


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_that_share_keys(queries: int, masked: bool) -> None:
    torch.manual_seed(queries)
    inputs = [torch.randn(2, 6, queries, 8), *torch.randn(2, 2, 2, 50, 8)]
    if masked:
        inputs.append(torch.randn(2, 6, queries, 50))
    model = Read(groups=3, repeat=False)
    capture, gm = lowered(model, *inputs, target=HERE)
    assert queries == 1 or not runs or calls(gm) == []
    assert_close("rewrite/float32", actual=gm(*capture.args)[0], expected=model(*inputs))


@pytest.mark.parametrize("shape", [(2, 1, 1, 9), (1, 1, 1, 9), (1, 4, 1, 9), (1, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_masks_broadcast(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mask = torch.rand(shape) > 0.3 if dtype == torch.bool else torch.randn(shape)
    capture, gm = lowered(Read(), *cache(2, 4, 9, torch.float32), mask)
    assert calls(gm) == []
    expected = Read()(*cache(2, 4, 9, torch.float32), mask)
    assert_close("rewrite/float32", actual=gm(*capture.args)[0], expected=expected)


def test_a_sequence_that_is_masked_altogether_reads_zeros() -> None:
    mask = torch.zeros(2, 1, 1, 9)
    mask[1] = -torch.inf
    capture, gm = lowered(Read(), *cache(2, 4, 9, torch.float32), mask)
    actual = gm(*capture.args)[0]
    assert_close("rewrite/float32", actual=actual, expected=Read()(*cache(2, 4, 9, torch.float32), mask))
    assert actual[0].abs().min() > 0
    assert (actual[1] == 0).all()


def test_float64_is_computed_in_float64() -> None:
    query, key, value = cache(2, 2, 9, torch.float64)
    capture, gm = lowered(Read(), query, key, value)
    assert calls(gm) == []
    torch.testing.assert_close(gm(*capture.args)[0], Read()(query, key, value), rtol=1e-12, atol=1e-12)


def test_large_scores_do_not_overflow() -> None:
    query, key, value = cache(1, 2, 9, torch.float32)
    capture, gm = lowered(Read(), 1e6 * query, key, value)
    assert calls(gm) == []
    assert_close("rewrite/float32", actual=gm(*capture.args)[0], expected=Read()(1e6 * query, key, value))


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_causal_query_is_not_the_decode_form(length: int) -> None:
    """is_causal aligns the first query with the first key."""
    _, gm = lowered(Attend(is_causal=True), torch.randn(2, length, 16))
    (call,) = calls(gm)
    assert call.args[4] is True


def test_sums_that_are_read_stay_with_the_flash_kernel() -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ATTENTION(x, x, x)[1]

    capture, gm = lowered(Sums(), torch.randn(1, 2, 1, 8))
    assert len(calls(gm)) == 1
    assert torch.equal(gm(*capture.args)[0], capture.graph(*capture.args)[0])


# ---- many queries


def sliding(length: int) -> Tensor:
    position = torch.arange(length)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < 40)


def biased(length: int) -> Tensor:
    position = torch.arange(length, dtype=torch.float32)
    return (position - position[:, None]).masked_fill(position > position[:, None], -torch.inf) / 8


def padded(length: int) -> Tensor:
    """Nothing before the last third: queries there see no key at all."""
    position = torch.arange(length)
    return (position[:, None] >= position) & (position >= length - length // 3)


def one_row(length: int) -> Tensor:
    return torch.linspace(-1, 1, length)[None]


def one_column(length: int) -> Tensor:
    return torch.linspace(-1, 1, length)[:, None]


MASKS: dict[str, Mask | None] = {
    "none": None, "sliding": sliding, "biased": biased, "padded": padded, "one row": one_row, "one column": one_column,
}  # fmt: skip


@runs_here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [2, 16, 31, 33, 48, 97, 300])
@pytest.mark.parametrize("mask", MASKS)
def test_many_queries_are_ours(dtype: torch.dtype, length: int, mask: str) -> None:
    torch.manual_seed(length)
    model = Attend(MASKS[mask], dtype=dtype)
    capture, gm = lowered(model, torch.randn(2, length, 24, dtype=dtype), target=HERE)
    assert len(gm.graph.find_nodes(op="call_function", target=KERNEL)) == 1
    assert calls(gm) == []
    exact = Attend(MASKS[mask], dtype=torch.float64)(*(x.double() for x in capture.args))
    assert_close(row_for("rewrite", dtype), actual=gm(*capture.args)[0].double(), expected=exact)


@runs_here
@pytest.mark.parametrize("length", [1, 2, 65])
def test_is_causal(length: int) -> None:
    capture, gm = lowered(Attend(is_causal=True), torch.randn(2, length, 16), target=HERE)
    assert calls(gm) == []
    assert_close("rewrite/float32", actual=gm(*capture.args)[0], expected=Attend(is_causal=True)(*capture.args))


@runs_here
@pytest.mark.parametrize(("queries", "keys"), [(3, 50), (50, 3), (33, 48), (260, 500)])
@pytest.mark.parametrize("channels", [1, 8, 24, 80, 128])
def test_other_lengths_and_channels(queries: int, keys: int, channels: int) -> None:
    query, key, value = torch.randn(1, 2, queries, channels), *torch.randn(2, 1, 2, keys, channels)
    capture, gm = lowered(Read(), query, key, value, target=HERE)
    assert calls(gm) == []
    assert_close("rewrite/float32", actual=gm(*capture.args)[0], expected=Read()(query, key, value))


@runs_here
def test_a_length_known_only_at_the_call() -> None:
    _, gm = lowered(Attend(sliding), torch.randn(2, 9, 16), dynamic=True, target=HERE)
    assert len(gm.graph.find_nodes(op="call_function", target=KERNEL)) == 1


@runs_here
def test_float64_stays_with_the_flash_kernel() -> None:
    _, gm = lowered(Attend(), torch.randn(2, 9, 16, dtype=torch.float64), target=HERE)
    assert len(calls(gm)) == 1


@runs_here
def test_nan_is_not_hidden() -> None:
    x = torch.randn(1, 2, 40, 8)
    for place in range(3):
        operands = [x.clone() for _ in range(3)]
        operands[place][0, 1, 7, 3] = torch.nan
        y = KERNEL(*operands, None, False, 1.0)
        expected = scaled_dot_product_attention(*operands, scale=1.0)
        assert torch.equal(y.isnan(), expected.isnan())
        assert y.isnan().any()


@runs_here
def test_the_operator_has_a_schema_and_a_fake() -> None:
    query, key = torch.randn(2, 5, 3, 8).transpose(1, 2), torch.randn(2, 3, 7, 8)
    mask = torch.randn(2, 1, 5, 7).expand(2, 3, 5, 7)
    torch.library.opcheck(KERNEL, (query, key, key, mask, False, 0.5))


@runs_here
@pytest.mark.parametrize(("changed", "named"), [
    ({"query": torch.randn(3, 5, 8)}, "query"),
    ({"key": torch.randn(2, 3, 8, 7).mT}, "key"),
    ({"value": torch.randn(2, 3, 6, 8)}, "value"),
    ({"mask": torch.randn(2, 1, 5, 7)}, "mask"),
    ({"query": torch.randn(2, 3, 5, 8).double()}, "query"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")  # fmt: skip
def test_the_operator_refuses_memory_that_it_would_misread(changed: dict[str, Tensor], named: str) -> None:
    key = torch.randn(2, 3, 7, 8)
    named_operands = {"query": torch.randn(2, 3, 5, 8), "key": key, "value": key, "mask": None} | changed
    with pytest.raises(RuntimeError, match=named):
        KERNEL(*named_operands.values(), False, 1.0)


def test_without_avx512_the_flash_kernel_stays() -> None:
    capture, gm = lowered(Attend(biased), torch.randn(2, 9, 16))
    assert len(calls(gm)) == 1
    assert torch.equal(gm(*capture.args)[0], capture.graph(*capture.args)[0])
