"""The compressed-tensors package's arithmetic: its grid, and the logits of stock transformers."""

from pathlib import Path

import pytest
import torch
from checkpoints import logits, quantized
from torch import nn

import qcompile
from qcompile.checkpoint.fake_quantized import fake_quantized
from qcompile.quantized_linear import QuantizedLinear


def test_its_grid_is_not_ours() -> None:
    linear = QuantizedLinear(torch.eye(4, dtype=torch.int8), torch.ones(4, 1))
    x = torch.tensor([[[-127.5, 100.2, 64.0, 0.0]]])
    with fake_quantized(nn.Sequential(linear)):
        assert linear(x).tolist() == [[[-128.0, 100.0, 64.0, 0.0]]]
    torch.testing.assert_close(linear(x) * 127 / 127.5, torch.tensor([[[-127.0, 100.0, 64.0, 0.0]]]))


def test_rows_of_zeros_stay_zero() -> None:
    linear = QuantizedLinear(torch.eye(4, dtype=torch.int8), torch.ones(4, 1))
    with fake_quantized(nn.Sequential(linear)):
        assert not linear(torch.zeros(1, 2, 4)).any()


def test_afterwards_everything_is_as_it_was() -> None:
    model = quantized()
    before = logits(model)

    def fail() -> None:
        with fake_quantized(model):
            assert not torch.equal(logits(model), before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("load", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("dtype", "activations"), [("int8", "token"), ("int8", "static"), ("fp8", "token"), ("fp8", "static")]
)
def test_stock_transformers_computes_the_same(tmp_path: Path, dtype: str, activations: str, load: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    from transformers import AutoModelForCausalLM

    model = quantized(dtype, activations, load)
    qcompile.save_pretrained(model, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with fake_quantized(model):
        assert torch.equal(logits(model), logits(stock))
