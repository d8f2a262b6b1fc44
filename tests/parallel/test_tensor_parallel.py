"""What each process keeps of a model, and what is refused before anything is cut."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IDS, llama, quantized
from torch import nn

import qcompile
from qcompile.errors import CheckpointError, ConfigError
from qcompile.parallel.row_parallel import RowParallelLinear
from qcompile.parallel.tensor_parallel import cuts, shard
from qcompile.quantized_linear import QuantizedLinear, quantized_linears

LAYER = "model.layers.0"
COLUMNS = tuple(f"{LAYER}.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"))
ROWS = (f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj")


def parts(size: int, **options: Any) -> list[Any]:
    """What each of `size` processes keeps."""
    models = [quantized(**options) for _ in range(size)]
    for rank, model in enumerate(models):
        with torch.no_grad():
            for linear in quantized_linears(model).values():
                linear.bias = nn.Parameter(torch.arange(float(linear.out_features)), requires_grad=False)
        shard(model, rank, size, "group")
    return models


@pytest.mark.parametrize("activations", ["token", "static"])
def test_column_parallel_cuts_output_channels(activations: str) -> None:
    whole, models = quantized(activations=activations), parts(2, activations=activations)
    for name in COLUMNS:
        linear, shares = whole.get_submodule(name), [model.get_submodule(name) for model in models]
        for key in ("weight", "weight_scale"):
            assert torch.equal(torch.cat([getattr(share, key) for share in shares]), getattr(linear, key))
        assert torch.equal(torch.cat([share.bias for share in shares]), torch.arange(float(linear.out_features)))
        assert [share.out_features for share in shares] == [linear.out_features // 2] * 2
        assert all(same_scale(share, linear) for share in shares)


@pytest.mark.parametrize("activations", ["token", "static"])
def test_row_parallel_cuts_input_channels_of_the_weight_alone(activations: str) -> None:
    whole, models = quantized(activations=activations), parts(2, activations=activations)
    for name in ROWS:
        linear, shares = whole.get_submodule(name), [model.get_submodule(name) for model in models]
        assert all(isinstance(share, RowParallelLinear) and share.group == "group" for share in shares)
        kept = [share.linear for share in shares]
        assert torch.equal(torch.cat([share.weight for share in kept], 1), linear.weight)
        for share in kept:
            assert torch.equal(share.weight_scale, linear.weight_scale)
            assert torch.equal(share.bias, torch.arange(float(linear.out_features)))
            assert share.weight.is_contiguous()
            assert same_scale(share, linear)


def same_scale(share: QuantizedLinear, linear: QuantizedLinear) -> bool:
    if linear.input_scale is None:
        return share.input_scale is None
    return share.input_scale is not None and torch.equal(share.input_scale, linear.input_scale)


def test_a_share_does_not_hold_on_to_the_whole() -> None:
    for linear in quantized_linears(parts(2)[1]).values():
        for tensor in (linear.weight, linear.weight_scale):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_siblings_keep_sharing_one_static_scale() -> None:
    attention = parts(2, activations="static")[0].get_submodule(f"{LAYER}.self_attn")
    assert attention.q_proj.input_scale is attention.k_proj.input_scale


def test_what_is_not_quantized_stays_whole() -> None:
    whole, part = quantized(), parts(2)[1]
    for name, module in whole.named_modules():
        if not list(module.children()) and not isinstance(module, QuantizedLinear):
            for key, tensor in module.state_dict().items():
                assert torch.equal(part.get_submodule(name).state_dict()[key], tensor)


def test_a_block_in_float_stays_whole_beside_a_block_that_is_cut() -> None:
    model = qcompile.quantize(llama(), [IDS], ignore=["lm_head", "*self_attn*"])
    found = cuts(model, 2)
    assert {name.rpartition(".")[0] for name in found} == {f"{LAYER}.mlp"}


def test_a_share_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="needs a whole model; this is one process's share"):
        qcompile.save_pretrained(parts(2)[0], tmp_path / "out")


def renamed(**styles: str | None) -> Callable[[Any], None]:
    """The plan with other styles for some projections, None for no entry."""

    def change(model: Any) -> None:
        plan = dict(model.tp_plan)
        for key in list(plan):
            if (name := key.rpartition(".")[2]) in styles:
                style = styles[name]
                plan.pop(key) if style is None else plan.update({key: style})
        model._tp_plan = plan

    return change


def without_plan(model: Any) -> None:
    model._tp_plan = {}


def float_projection(model: Any) -> None:
    model.get_submodule(f"{LAYER}.mlp").up_proj = nn.Linear(32, 48)


def sinks(model: Any) -> None:
    model.get_submodule(f"{LAYER}.self_attn").sinks = nn.Parameter(torch.zeros(4))
    model._tp_plan = {**model.tp_plan, "model.layers.*.self_attn.sinks": "rowwise"}


def wide_heads(model: Any) -> None:
    model.get_submodule(f"{LAYER}.self_attn").head_dim = 16


def odd_width(model: Any) -> None:
    mlp = model.get_submodule(f"{LAYER}.mlp")
    mlp.down_proj = QuantizedLinear(torch.zeros(32, 47, dtype=torch.int8), torch.ones(32))


@pytest.mark.parametrize(
    ("change", "size", "said"),
    [
        (without_plan, 2, "follows transformers' plan for the model; LlamaForCausalLM has none; run it in one process"),
        (renamed(**dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])), 2,
         "the plan for LlamaForCausalLM names none of them"),
        (renamed(o_proj=None), 2, "must name every quantized linear of a layer that it cuts; "
         f"{LAYER}.self_attn.o_proj is not named"),
        (renamed(gate_proj="colwise_gather_output"), 2, f"{LAYER}.mlp.gate_proj is colwise_gather_output"),
        (renamed(down_proj="packed_rowwise"), 2, f"{LAYER}.mlp.down_proj is packed_rowwise"),
        (float_projection, 2, f"needs all of {LAYER}.mlp quantized that its plan cuts; {LAYER}.mlp.up_proj is not"),
        (sinks, 2, f"{LAYER}.self_attn.sinks is not"),
        (lambda model: None, 3, "must divide num_attention_heads, 4; got 3 processes; start fewer"),
        (lambda model: None, 4, "must divide num_key_value_heads, 2; got 4 processes"),
        (wide_heads, 2, f"the output channels of {LAYER}.self_attn.k_proj, 16 in heads of 16; got 2"),
        (odd_width, 2, f"must divide the input channels of {LAYER}.mlp.down_proj, 47; got 2 processes"),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else str(value)[:40],
)  # fmt: skip
def test_refusals_are_one_line_and_change_nothing(change: Callable[[Any], None], size: int, said: str) -> None:
    model = quantized()
    change(model)
    before = {name: linear.weight for name, linear in quantized_linears(model).items()}
    with pytest.raises(ConfigError) as caught:
        shard(model, 0, size, "group")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {name: linear.weight for name, linear in quantized_linears(model).items()} == before


def test_merged_projections_are_refused() -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    model = qcompile.quantize(Phi3ForCausalLM(config).eval(), [IDS])
    with pytest.raises(ConfigError, match="knows the plan styles colwise and rowwise; .* is rowwise_split_input"):
        shard(model, 0, 2, "group")


def test_a_quantized_head_is_refused() -> None:
    model = qcompile.quantize(llama(tied=False), [IDS], ignore=[])
    with pytest.raises(ConfigError, match="lm_head is colwise_gather_output"):
        shard(model, 0, 2, "group")
