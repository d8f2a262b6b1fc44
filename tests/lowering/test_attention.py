"""What attention becomes on targets that have no form of their own for a call, and inside a layer's code for a GPU."""

import re
from typing import Any

import pytest
import torch
from graphs import captured
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import qcompile.passes as passes
from qcompile import ops
from qcompile.config import Config
from qcompile.lowering.attention import attention
from qcompile.lowering.inductor import decompositions
from qcompile.lowering.lower import lower
from qcompile.lowering.partition import partition
from qcompile.lowering.target import Target

# Where there is a real GPU, it would be in the way of the one that torch is told of.
pretending = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU; tests/gpu uses it")
CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def traced(target: Target, *inputs: Any, causal: bool = False, scale: float = 0.3) -> tuple[GraphModule, Tensor]:
    tensors = [x for x in inputs if x is not None]

    def call(*given: Tensor) -> Tensor:
        remaining = iter(given)
        query, key, value, mask = (None if x is None else next(remaining) for x in inputs)
        assert query is not None
        assert key is not None
        assert value is not None
        return attention(target, query, key, value, mask, causal, scale)

    gm = make_fx(call)(*tensors)
    return gm, gm(*tensors)


def keys_read(gm: GraphModule) -> int:
    (call,) = gm.graph.find_nodes(op="call_function", target=CPU_FLASH)
    return int(call.args[1].meta["tensor_meta"].shape[1])


def operands(dtype: torch.dtype = torch.float32, queries: int = 5, channels: int = 16) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    key, value = torch.randn(2, 2, 2, 9, channels).to(dtype)
    return torch.randn(2, 6, queries, channels).to(dtype), key, value


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_torch_attends_where_nothing_else_does(kind: str, masked: bool) -> None:
    inputs = operands(torch.float64 if kind == "cpu" else torch.float32)
    mask = torch.rand(2, 1, 5, 9) > 0.4 if masked else None
    gm, y = traced(Target(kind, 90 if kind == "cuda" else 0), *inputs, mask)  # type: ignore[arg-type]
    torch.testing.assert_close(y, ops.attention(*inputs, mask, False, 0.3))
    assert keys_read(gm) == (2 if kind == "cpu" else 6)


@pytest.mark.parametrize(("target", "dtype", "channels", "mask", "heads"), [
    (Target("cuda", 90), torch.bfloat16, 128, False, 2), (Target("cuda", 80), torch.float16, 256, False, 2),
    (Target("cuda", 75), torch.float16, 128, False, 6), (Target("cuda", 90), torch.float32, 128, False, 6),
    (Target("cuda", 90), torch.bfloat16, 264, False, 6), (Target("cuda", 90), torch.bfloat16, 128, True, 6),
])  # fmt: skip
def test_shared_keys_are_read_where_they_are_by_flash_kernels_only(
    target: Target, dtype: torch.dtype, channels: int, mask: bool, heads: int
) -> None:
    """For others torch would write out every score."""
    gm, _ = traced(target, *operands(dtype, channels=channels), torch.ones(5, 9, dtype=torch.bool) if mask else None)
    assert keys_read(gm) == heads


def test_causal() -> None:
    query, key, value = operands(queries=9)
    gm, y = traced(Target("cuda", 90), query, key, value, None, causal=True)
    (call,) = gm.graph.find_nodes(op="call_function", target=CPU_FLASH)
    assert call.args[4] is True
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(y, ops.attention(query, key, value, mask, False, 0.3))


class Step(nn.Module):
    """A step of a two-layer Llama: one token and its cache, or a prompt without one."""

    def __init__(self, batch: int, tokens: int) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=4,
            num_hidden_layers=2, vocab_size=64, attn_implementation="sdpa",
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)
        self.cache: StaticCache | None = None
        if tokens == 1:
            self.cache = StaticCache(config=config, max_cache_len=512)
            self.model(input_ids=torch.ones(batch, 8, dtype=torch.long), past_key_values=self.cache)

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        if self.cache is None:
            y: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return y
        found: Tensor = self.model(input_ids=ids, past_key_values=self.cache, position_ids=position).logits
        return found


def launches(batch: int, tokens: int) -> list[str]:
    """What the generated code for an H200 launches, in order."""
    pytest.importorskip("triton")
    from absent_gpu import inductor_source

    target = Target("cuda", 90)
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    capture = captured(Step(batch, tokens), ids, torch.full((batch, 1), 9))
    quantized, _ = passes.quantizing(Config()).run(capture.graph)
    lowered, _ = lower(quantized, target, decompositions())
    source = inductor_source(partition(lowered).run, target)
    body = source[source.index("def call(") :]
    called = r"(\w+)\.run\(|= torch\.ops\.(?:aten|qcompile_hopper)\.(\w+)|extern_kernels\.(\w+)\("
    found = re.findall(called, body)
    return ["".join(names) for names in found]


@pretending
@pytest.mark.inductor
@pytest.mark.parametrize("batch", [1, 3])
def test_decode_is_one_kernel_per_layer_and_no_copies(batch: int) -> None:
    """Between q/k/v and o: the new key, the new value, the query, attention, and its parts' sum with the quantize step.
    The mask is made once for all layers."""
    names = launches(batch, 1)
    products = [at for at, name in enumerate(names) if name.startswith("scaled_mm_kernel")]
    assert len(products) == 8
    assert not [name for name in names if "scaled_dot_product" in name and not name.startswith("triton_")]
    assert len([name for name in names if "_le_" in name]) == 1
    assert len([name for name in names if name.startswith("triton_for")]) == 1, "counts of both layers"
    assert not [name for name in names if "add_copy" in name]
    between = names[products[4] + 1 : products[5]]  # of the second layer: the first makes the rotation, too
    assert [name.partition("_fused")[0].partition("_kernel")[0] for name in between] == [
        "triton_poi", "triton_poi", "triton_poi", "attention", "triton_per",
    ]  # fmt: skip


@pretending
@pytest.mark.inductor
def test_a_prompt_needs_no_mask_and_no_repeated_keys() -> None:
    """Between q/k/v and o: the query and the key, turned; attention, which reads the value where it is; quantize."""
    names = launches(1, 128)
    products = [at for at, name in enumerate(names) if name.startswith("scaled_mm")]
    between = names[products[4] + 1 : products[5]]
    attention = [name for name in between if "scaled_dot_product" in name and not name.startswith("triton_")]
    assert len(attention) == 1
    assert len(between) == 4, between
    chosen = [name for name in between if "_where_" in name and "_isinf_" not in name]  # a scale's where is no mask's
    assert not [name for name in between if "_le_" in name] + chosen
