"""Kernels opened up for Inductor, and what Inductor makes of a Llama layer for a GPU that is not here."""

import functools
import re
import threading
from typing import Any

import pytest
import torch
from graphs import GatedMLP, captured, count
from torch.fx import GraphModule
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import qcompile.passes as passes
from qcompile import ops
from qcompile.config import Config
from qcompile.lowering.expand_kernels import expand_kernels, with_workspace
from qcompile.lowering.inductor import decompositions
from qcompile.lowering.lower import lower
from qcompile.lowering.partition import partition
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import MOST_PARTS, Row, Table, Tile

pytest.importorskip("triton")

from absent_gpu import inductor_source, on_cuda, pretended

from qcompile.lowering import scaled_mm_kernel

# Where there is a real GPU, it would be in the way of the one that torch is told of.
pretending = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU; tests/gpu uses it")
TARGETS = {"sm80": Target("cuda", 80), "sm89": Target("cuda", 89), "sm90": Target("cuda", 90)}
FUNCTIONAL = "triton_kernel_wrapper_functional"


class Layer(torch.nn.Module):
    """One decoder layer of a Llama with grouped-query attention, in bfloat16."""

    def __init__(self, width: int) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=width, intermediate_size=2816, num_attention_heads=width // 64, num_key_value_heads=4,
            num_hidden_layers=1, attn_implementation="sdpa",
        )  # fmt: skip
        self.layer = LlamaDecoderLayer(config, 0)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        y = self.layer(x, position_embeddings=(cos, sin))
        return y if isinstance(y, torch.Tensor) else y[0]


@functools.cache
def lowered_layer(tokens: int, target: str, dtype: str, width: int = 1024, table: Table | None = None) -> GraphModule:
    torch.manual_seed(0)
    example = torch.randn(1, tokens, width, dtype=torch.bfloat16)
    rotation = torch.randn(1, tokens, 64, dtype=torch.bfloat16)
    graph = captured(Layer(width).bfloat16(), example, rotation, rotation.clone()).graph
    quantized, _ = passes.quantizing(Config(dtype=dtype)).run(graph)  # type: ignore[arg-type]
    lowered, chosen = lower(quantized, TARGETS[target], decompositions(), table)
    assert set(chosen.values()) == {"triton"}
    return partition(lowered).run


@pytest.mark.parametrize(("target", "dtype"), [("sm80", "int8"), ("sm89", "int8"), ("sm90", "int8"), ("sm90", "fp8")])
@pytest.mark.parametrize("tokens", [1, 256])
def test_a_llama_layer_is_four_products_and_four_quantizations(target: str, dtype: str, tokens: int) -> None:
    run = lowered_layer(tokens, target, dtype)
    products = run.graph.find_nodes(op="call_function", target=torch.ops.qcompile_triton.scaled_mm.default)
    assert len(products) == 4
    shapes = [tuple(node.args[1].meta["val"].shape) for node in products]
    assert shapes == [(1536, 1024), (1024, 1024), (5632, 1024), (1024, 2816)], "qkv, o, gate and up, down"
    assert [node.args[5] is not None for node in products] == [False, True, False, True], "residuals are in epilogues"
    assert count(run, torch.ops.aten.amax.default) == 4, "one absmax per product's input"
    assert not [node for node in run.graph.nodes if node.target in ops.REFERENCES]
    assert not [node for node in run.graph.nodes if node.target in (torch.ops.aten.mm.default, torch.ops.aten._int_mm)]


def kernels(source: str) -> list[str]:
    """Names of the kernels that the generated code launches, in order; products for Hopper are `scaled_mm`."""
    body = source[source.index("def call(") :]
    found = re.findall(r"(\w+)\.run\(|qcompile_hopper\.(\w+)\.default\(", body)
    names = [launched or called for launched, called in found]
    return [name for name in names if name.startswith(("triton_", "scaled_mm"))]


@pretending
@pytest.mark.inductor
@pytest.mark.parametrize(("target", "dtype"), [("sm80", "int8"), ("sm89", "fp8"), ("sm90", "int8")])
def test_inductor_launches_exactly_the_kernels_intended(target: str, dtype: str) -> None:
    """norm + quantize is one kernel, silu·mul + quantize is one, and nothing stands between them and the products."""
    found = kernels(inductor_source(lowered_layer(2048, target, dtype), TARGETS[target]))
    short = ["product" if name.startswith("scaled_mm") else name for name in found]
    assert short.count("product") == 4
    at = [index for index, name in enumerate(short) if name == "product"]
    starts = [0, *(index + 1 for index in at)]
    into_qkv, into_o, into_gate_up, into_down = (found[a:b] for a, b in zip(starts, at, strict=False))
    assert len(into_qkv) == 1, into_qkv
    assert "rsqrt" in into_qkv[0]
    assert "amax" in into_qkv[0]
    assert len(into_gate_up) == 1, into_gate_up
    assert "rsqrt" in into_gate_up[0]
    assert "amax" in into_gate_up[0]
    assert len(into_down) == 1, into_down
    assert "amax" in into_down[0]
    assert sum("amax" in name for name in into_o) == 1, into_o
    assert found[at[3] + 1 :] == []
    assert not [name for name in found if name.startswith("triton_red")], "no row is read more than once"


@pretending
@pytest.mark.inductor
@pytest.mark.parametrize("parts", [2, MOST_PARTS])
def test_the_sum_of_a_split_product_is_part_of_the_next_kernel(parts: int) -> None:
    """Decode: o_proj's partial sums, scales, residual, the next norm and its quantize step are one kernel."""
    tile = Tile(16, 64, 128, swap=True, split=parts)
    table = Table("absent", "this test", (Row("int8", None, None, None, tile),))
    source = inductor_source(lowered_layer(1, "sm90", "int8", 2048, table), TARGETS["sm90"])
    found = kernels(source)
    at = [index for index, name in enumerate(found) if name.startswith("scaled_mm_kernel")]
    assert len(at) == 4
    between = found[at[1] + 1 : at[2]]
    assert len(between) == 1, between
    assert between[0].startswith("triton_per")
    assert "sum" in between[0]
    assert "amax" in between[0]


@pretending
def test_only_the_result_is_written() -> None:
    """Inductor copies whatever a kernel may write and something else reads: that must be the output alone."""
    capture = captured(GatedMLP(256, 512), torch.randn(3, 256))
    quantized, _ = passes.quantizing(Config()).run(capture.graph)
    run = partition(lower(quantized, TARGETS["sm90"], decompositions())[0]).run
    with pretended(TARGETS["sm90"]):
        opened = expand_kernels(on_cuda(run), decompositions())
    launches = [node for node in opened.graph.nodes if FUNCTIONAL in str(node.target)]
    assert len(launches) == 2
    assert [node.kwargs["tensors_to_clone"] for node in launches] == [["out"], ["out"]]
    assert not opened.meta["tma"]
    assert not count(opened, torch.ops.qcompile_triton.scaled_mm.default)


@pretending
@pytest.mark.inductor
def test_inductor_takes_the_form_with_tma() -> None:
    """One launch a product, its operands read in place, and the kernel told to use TMA."""
    tile = Tile(128, 256, 128, warps=8, stages=3, tma=True)
    table = Table("absent", "this test", (Row("int8", None, None, None, tile),))
    capture = captured(GatedMLP(256, 512).bfloat16(), torch.randn(2048, 256, dtype=torch.bfloat16))
    quantized, _ = passes.quantizing(Config()).run(capture.graph)
    run = partition(lower(quantized, TARGETS["sm90"], decompositions(), table)[0]).run
    with pretended(TARGETS["sm90"]):
        opened = expand_kernels(on_cuda(run), decompositions())
    launches = [node for node in opened.graph.nodes if FUNCTIONAL in str(node.target)]
    assert [node.kwargs["tensors_to_clone"] for node in launches] == [["out"], ["out"]]
    source = inductor_source(run, TARGETS["sm90"])
    assert [name[:9] for name in kernels(source) if name.startswith("scaled_mm")] == ["scaled_mm"] * 2
    assert "'TMA': True" in source
    assert "make_tensor_descriptor" in source
    assert opened.meta["tma"]


@pretending
@pytest.mark.inductor
def test_inductor_calls_the_kernel_for_hopper() -> None:
    """An operator of its own, which nothing opens up, once a product, with bias and residual in it."""
    capture = captured(GatedMLP(256, 512).bfloat16(), torch.randn(2048, 256, dtype=torch.bfloat16))
    quantized, _ = passes.quantizing(Config()).run(capture.graph)
    run = partition(lower(quantized, TARGETS["sm90"], decompositions())[0]).run
    with pretended(TARGETS["sm90"]):
        opened = expand_kernels(on_cuda(run), decompositions())
    assert count(opened, torch.ops.qcompile_hopper.scaled_mm.default) == 2  # gate and up, down
    assert not opened.meta["tma"], "its descriptors are made by the host"
    source = inductor_source(run, TARGETS["sm90"])
    assert source.count("torch.ops.qcompile_hopper.scaled_mm.default(") == 2
    assert [name for name in kernels(source) if name.startswith("scaled_mm")] == ["scaled_mm"] * 2


def test_every_thread_gets_memory_for_descriptors() -> None:
    """Triton's allocator belongs to a thread, and Inductor sets it at a kernel's first launch only."""
    from triton.runtime import _allocation

    def run(args: list[Any]) -> Any:
        return _allocation._allocator.get()

    found: list[Any] = []
    call = with_workspace(run)
    for target in (lambda: found.append(run([])), lambda: found.append(call([]))):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    assert type(found[0]).__name__ == "NullAllocator"
    assert found[1] is scaled_mm_kernel._workspace
    assert call._boxed_call  # type: ignore[attr-defined]


@pretending
def test_inputs_keep_their_records() -> None:
    capture = captured(GatedMLP(256, 512), torch.randn(3, 256))
    quantized, _ = passes.quantizing(Config()).run(capture.graph)
    run = partition(lower(quantized, TARGETS["sm90"], decompositions())[0]).run
    with pretended(TARGETS["sm90"]):
        opened = expand_kernels(run, decompositions())
    before, after = ([node.meta.get("input") for node in gm.graph.find_nodes(op="placeholder")] for gm in (run, opened))
    assert before == after


def test_symbolic_numbers_of_tokens_stay_operators() -> None:
    """They choose the tile at each call; no guard on the number is taken."""
    capture = captured(GatedMLP(256, 512), torch.randn(2, 5, 256), dynamic=True)
    quantized, _ = passes.quantizing(Config()).run(capture.graph)
    run = partition(lower(quantized, TARGETS["sm90"], decompositions())[0]).run
    opened = expand_kernels(run, decompositions())
    products = opened.graph.find_nodes(op="call_function", target=torch.ops.qcompile_triton.scaled_mm.default)
    assert len(products) == 2
    assert all(len(node.args[8]) > 40 for node in products)


def test_other_graphs_are_returned_as_they_are() -> None:
    run = captured(GatedMLP(), torch.randn(2, 5, 16)).graph
    assert expand_kernels(run, decompositions()) is run
