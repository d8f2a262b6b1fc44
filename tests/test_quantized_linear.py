"""QuantizedLinear: its numbers, its moves, and what the backend makes of it."""

import copy
from typing import Any

import pytest
import torch
from compiling import compiled
from tolerances import assert_close
from torch import Tensor, nn

from qcompile import backend, ops
from qcompile.errors import ConfigError
from qcompile.quantized_linear import QuantizedLinear, is_quantized, quantized_linears
from qcompile.stages import Stages, to_stages

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def make(linear: nn.Linear, dtype: torch.dtype = torch.int8, scale: nn.Parameter | None = None) -> QuantizedLinear:
    weight, weight_scale = ops.quantize(linear.weight.detach(), [], "row", dtype)
    return QuantizedLinear(weight, weight_scale, linear.bias.detach() if linear.bias is not None else None, scale)


class Block(nn.Module):
    """Three siblings behind a norm, one linear after an activation, a float head."""

    def __init__(self, *, static: bool = False) -> None:
        super().__init__()
        shared = nn.Parameter(torch.tensor([0.03]), requires_grad=False) if static else None
        self.norm = nn.LayerNorm(64)
        self.q, self.k, self.v = (make(nn.Linear(64, 64), scale=shared) for _ in range(3))
        self.o, self.head = make(nn.Linear(64, 64)), nn.Linear(64, 10)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y: Tensor = self.head(x + self.o(torch.relu(self.q(h)) * self.k(h) + self.v(h)))
        return y


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_linear_within_quantization(dtype: str) -> None:
    linear, x = nn.Linear(64, 32), torch.randn(3, 5, 64)
    with torch.no_grad():
        assert_close(f"{dtype}/linear", actual=make(linear, DTYPES[dtype])(x), expected=linear(x))


@pytest.mark.parametrize("read", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_what_it_cannot_read_is_named(read: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=rf"got {read}: the model casts what it reads"):
        make(nn.Linear(16, 8))(torch.zeros(2, 16).to(read))


def test_static_activations_saturate_at_their_range() -> None:
    linear = make(nn.Linear(16, 4, bias=False), scale=nn.Parameter(torch.tensor([0.01]), requires_grad=False))
    x = torch.full((1, 16), 100.0)
    torch.testing.assert_close(linear(x), linear(x / 50))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_change_of_dtype_concerns_the_bias_alone(dtype: torch.dtype) -> None:
    linear = make(nn.Linear(16, 4), dtype, nn.Parameter(torch.tensor([0.01]), requires_grad=False))
    before = copy.deepcopy(linear)
    linear.to(torch.bfloat16)
    assert linear.weight.dtype == dtype
    for name in ("weight", "weight_scale", "input_scale"):
        assert torch.equal(linear.get_parameter(name).view(torch.int8), before.get_parameter(name).view(torch.int8))
    assert linear.bias is not None
    assert linear.bias.dtype == torch.bfloat16


def test_siblings_share_their_scale_object_also_after_a_move() -> None:
    block = Block(static=True).half()
    assert block.q.input_scale is block.v.input_scale
    assert len({id(p) for p in block.parameters()}) == len(list(block.parameters()))


def test_an_empty_one_takes_no_memory_and_can_be_materialized() -> None:
    linear = QuantizedLinear.empty((4, 16), torch.float8_e4m3fn, torch.bfloat16, static=True)
    assert all(p.is_meta for p in linear.parameters())
    linear.to_empty(device="cpu")
    assert [p.dtype for p in linear.parameters()] == [torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.float32]


def test_its_text_says_what_it_is() -> None:
    assert str(make(nn.Linear(16, 4))) == "QuantizedLinear(16, 4, bias=True, int8, token)"


def test_models_know_what_is_quantized() -> None:
    block = Block()
    assert set(quantized_linears(block)) == {"q", "k", "v", "o"}
    assert is_quantized(block)
    assert not is_quantized(nn.Linear(2, 2))


@pytest.mark.parametrize("static", [False, True])
def test_the_backend_takes_it_as_its_own(static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Stages] = []

    def keep(*args: Any, **options: Any) -> Stages:
        made.append(to_stages(*args, **options))
        return made[-1]

    monkeypatch.setattr(backend, "to_stages", keep)
    block, x = Block(static=static).eval(), torch.randn(3, 5, 64)
    expected = block(x)
    with torch.no_grad():
        assert_close("rewrite/float32", actual=compiled(block, verify=True)(x), expected=expected)
    (stages,) = made
    assert stages.quantized is not None
    products = stages.quantized.graph.find_nodes(op="call_function", target=ops.scaled_mm)
    assert len(products) == 2  # q, k and v are one; the head stays in float
    assert any("already quantized" in refusal.reason for refusal in stages.refusals)


def test_merged_weights_are_not_kept_twice() -> None:
    block, x = Block().eval(), torch.randn(3, 64)
    before = copy.deepcopy(block)
    fast = compiled(block)
    with torch.no_grad():
        first = fast(x)
    storages = {linear.weight.untyped_storage().data_ptr() for linear in (block.q, block.k, block.v)}
    assert len(storages) == 1
    assert torch.equal(block.k.weight, before.k.weight)
    with torch.no_grad():
        assert torch.equal(fast(x), first)
        other = torch.randn(7, 64)
        assert_close("rewrite/float32", actual=fast(other), expected=before(other))
    with torch.no_grad():
        block.k.weight.zero_()  # a write into the shared memory is seen
        before.k.weight.zero_()
        assert_close("rewrite/float32", actual=fast(x), expected=before(x))
