"""The hooks on their own: which modules are swapped, which tensors are let through."""

import pytest
import torch
from checkpoints import llama
from torch import nn
from transformers.pytorch_utils import Conv1D

from qcompile.checkpoint.folder import Stored
from qcompile.checkpoint.formats import Group, Layout, Scheme
from qcompile.checkpoint.transformers_quantizer import (
    LoadingConfig,
    Quantizer,
    check_tensors,
    make_room,
    spread,
    swap,
)
from qcompile.errors import CheckpointError
from qcompile.quantized_linear import QuantizedLinear, quantized_linears

INT8 = Group(Scheme("int8", False), ("Linear", "Conv1D"))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv, self.norm = nn.Linear(8, 4), Conv1D(4, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 2, bias=False)


def test_targets_are_swapped_and_nothing_else() -> None:
    with torch.device("meta"):
        model = Mixed()
    swap(model, Layout("compressed-tensors", (INT8,), ("head",)), {})
    assert set(quantized_linears(model)) == {"fc", "conv"}
    conv = model.get_submodule("conv")
    assert isinstance(conv, QuantizedLinear)
    assert conv.weight.shape == (4, 8)
    assert conv.is_conv1d
    assert not model.get_submodule("fc").is_conv1d
    assert conv.bias is not None


def test_lmdeploy_shows_in_the_file_what_it_left_in_float() -> None:
    model = Mixed()
    tensors = {"fc.weight": Stored(torch.int8, (4, 8)), "head.weight": Stored(torch.bfloat16, (2, 8))}
    swap(model, Layout("lmdeploy", (INT8,), ()), tensors)
    assert set(quantized_linears(model)) == {"fc"}


def test_no_target_at_all_is_refused() -> None:
    with pytest.raises(CheckpointError, match="none of its targets is there"):
        make_room(Mixed(), Layout("compressed-tensors", (Group(INT8.scheme, ("Nothing",)),), ()), {})


def test_one_scale_for_a_weight_is_spread_over_its_rows() -> None:
    model = Mixed()
    stored = {"fc.weight_scale": Stored(torch.float32, (1,)), "fc.input_scale": Stored(torch.float32, ())}
    swap(model, Layout("compressed-tensors", (Group(Scheme("int8", True), ("fc",)),), ()), stored)
    linear = quantized_linears(model)["fc"]
    linear.to_empty(device="cpu")
    with torch.no_grad():
        linear.weight_scale.fill_(0.5)
    spread(linear)
    assert linear.weight_scale.tolist() == [[0.5]] * 4
    assert linear.input_scale is not None
    assert linear.input_scale.shape == (1,)


def test_names_with_another_prefix_are_checked_too() -> None:
    model = llama()
    shape = tuple(model.model.norm.weight.shape)
    check_tensors(model, None, {"norm.weight": Stored(torch.bfloat16, shape), "unknown": Stored(None, ())})
    with pytest.raises(CheckpointError, match=r"norm\.weight must have shape"):
        check_tensors(model, None, {"norm.weight": Stored(torch.bfloat16, (3,))})
    with pytest.raises(CheckpointError, match=r"norm\.weight must be floating point; got torch\.int8"):
        check_tensors(model, None, {"model.norm.weight": Stored(torch.int8, shape)})


def test_eight_bit_tensors_are_not_cast() -> None:
    quantizer = Quantizer(LoadingConfig(Layout("lmdeploy", (INT8,), ()), {}, {}))
    assert quantizer.pre_quantized
    assert quantizer.get_new_dtype(None, torch.zeros(1), torch.int8) is None
    assert quantizer.get_new_dtype(None, torch.zeros(1), torch.float8_e4m3fn) is None
    assert quantizer.get_new_dtype(None, torch.zeros(1, dtype=torch.bfloat16), torch.float32) == torch.float32
    assert not quantizer.is_trainable
    assert quantizer.is_compileable


def test_the_config_writes_the_original() -> None:
    assert LoadingConfig(None, {"quant_method": "smooth_quant"}).to_dict() == {"quant_method": "smooth_quant"}
