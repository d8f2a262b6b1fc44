"""The attention kernel's code for GPUs that are not here; its numbers are in tests/interpreter."""

import pytest
import torch

from qcompile.lowering.devices import device_of
from qcompile.lowering.target import Target

pytest.importorskip("triton")

from compile_only import compile_attention

from qcompile.lowering import attention_kernel

# (query heads per key head, channels): of Llama, a head of its own, Qwen, Falcon, the widest that is taken.
HEADS = [(4, 128), (1, 64), (7, 128), (71, 64), (8, 256), (64, 256)]


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
@pytest.mark.parametrize("heads", HEADS[:3], ids=str)
@pytest.mark.parametrize("mask", ["", "bool", "float"])
def test_it_compiles_well(capability: int, heads: tuple[int, int], mask: str) -> None:
    """No spilled register, shared memory within limits, matrix instructions of 16-bit operands."""
    built = compile_attention(*heads, mask, "bf16", capability)
    device = device_of(Target("cuda", capability))
    assert device is not None
    assert built.stack == 0
    assert built.shared <= device.shared // 2, "two programs fit a multiprocessor"
    assert built.instructions
    assert all("bf16.bf16" in operands for _, operands in built.instructions)


@pytest.mark.parametrize("heads", HEADS[3:], ids=str)
def test_wide_heads_compile(heads: tuple[int, int]) -> None:
    """Where shared memory is least, too. (In float32, without matrix instructions, 71 heads spill 120 bytes.)"""
    built = compile_attention(*heads, "bool", "bf16", 86)
    assert built.stack == 0
    assert built.shared <= 99 * 1024


@pytest.mark.parametrize(("heads", "dtype"), [
    ((1, 16, 512), "bf16"), ((1, 16, 512), "fp32"), ((8, 32, 256), "fp32"), ((16, 192, 128), "bf16"),
])  # fmt: skip
def test_values_may_be_wider_or_narrower_than_keys(heads: tuple[int, int, int], dtype: str) -> None:
    shares, channels, value_channels = heads
    built = compile_attention(shares, channels, "bool", dtype, 86, value_channels)
    assert built.shared <= 99 * 1024
    assert built.stack == 0 or dtype == "fp32"


def test_float32_fits() -> None:
    assert compile_attention(71, 64, "bool", "fp32", 86).shared <= 99 * 1024
    assert compile_attention(32, 256, "bool", "fp32", 86).shared <= 99 * 1024


def test_the_operator_and_its_fake_agree() -> None:
    with torch._subclasses.FakeTensorMode():
        query, key, value = torch.empty(3, 8, 1, 16), torch.empty(3, 2, 9, 16), torch.empty(3, 2, 9, 24)
        out, size = attention_kernel.attention_op(query, key, value, None, 0.5, 4)
    assert out.shape == (4, 3, 8, 24)
    assert size.shape == (4, 3, 8)
    assert out.dtype == size.dtype == torch.float32
    with torch._subclasses.FakeTensorMode():
        query, key = torch.empty(3, 8, 1, 16, dtype=torch.bfloat16), torch.empty(3, 2, 9, 16, dtype=torch.bfloat16)
        whole, size = attention_kernel.attention_op(query, key, key, None, 0.5, 1)
    assert (whole.shape, whole.dtype) == ((1, 3, 8, 16), torch.bfloat16)
    assert len(size) == 0
    assert torch.Tag.pt2_compliant_tag in torch.ops.qcompile_triton.attention.default.tags


def test_no_sequences_launch_nothing() -> None:
    query, key = torch.empty(0, 8, 1, 16), torch.empty(0, 2, 9, 16)
    assert attention_kernel.attention_op(query, key, key, None, 0.5, 2)[0].shape == (2, 0, 8, 16)
