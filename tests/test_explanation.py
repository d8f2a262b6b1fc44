"""explain: one row per linear, with its fate and the reason."""

import json
from typing import Any

import pytest
import torch
from checkpoints import quantized
from graphs import Attention, Broken, GatedMLP, PostNorm, ReluMLP
from probe import Body
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTModel,
)

import qcompile
from qcompile.errors import ConfigError, LoweringError
from qcompile.explanation import Explanation, example_call

SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100,
}  # fmt: skip


def llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, **changes)).eval().requires_grad_(False)


def explained(model: nn.Module, inputs: Any = None, **options: Any) -> dict[str, Any]:
    return {row.name.removeprefix("model.layers.0."): row for row in qcompile.explain(model, inputs, **options).rows}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_linear_of_a_llama(device: str) -> None:
    rows = explained(llama().to(device))
    assert list(rows) == [
        *(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "lm_head",
    ]  # fmt: skip
    head = rows.pop("lm_head")
    assert (head.kernel, head.reason) == ("", "its name matches an ignore pattern")
    into = {name: row.into for name, row in rows.items()}
    for name in ("q", "k", "v"):
        assert into[f"self_attn.{name}_proj"] == ("model.layers.0.input_layernorm.weight",)
    assert into["self_attn.o_proj"] == ("model.layers.0.self_attn.v_proj.weight",)
    assert into["mlp.gate_proj"] == into["mlp.up_proj"] == ("model.layers.0.post_attention_layernorm.weight",)
    assert into["mlp.down_proj"] == ("model.layers.0.mlp.up_proj.weight",)
    assert {(row.folded, row.absorbed, row.unfolded) for row in rows.values()} == {(1.0, 0.0, "")}
    assert {row.kernel for row in rows.values()} <= {"vnni", "int8_cpu", "avx512", "avx2", "int8_float"}
    assert rows["self_attn.q_proj"].macs == 16 * 64 * 64
    assert rows["self_attn.q_proj"].group == rows["self_attn.v_proj"].group != rows["self_attn.o_proj"].group


def test_totals_are_shares_of_the_work() -> None:
    totals = qcompile.explain(llama()).totals()
    projections = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    quantized = projections / (projections + 100 * 64)
    assert totals == pytest.approx({"quantized": quantized, "folded": quantized, "absorbed": 0, "float": 1 - quantized})


def test_a_tied_head_goes_by_its_own_name() -> None:
    rows = explained(llama(tie_word_embeddings=True))
    assert rows["lm_head"].reason == "its name matches an ignore pattern"
    rows = explained(llama(tie_word_embeddings=True), ignore=())
    assert rows["lm_head"].kernel
    assert rows["lm_head"].into == ("model.norm.weight",)


def test_what_is_not_folded_says_which_op_of_which_module_is_in_the_way() -> None:
    bert = BertModel(BertConfig(**SMALL)).eval().requires_grad_(False)
    rows = {row.name: row for row in qcompile.explain(bert).rows}
    down = rows["encoder.layer.0.output.dense"]
    assert (down.folded, down.absorbed) == (0, 1)
    assert down.unfolded == "no scale passes through, gelu in encoder.layer.0.intermediate.intermediate_act_fn"
    assert down.smoothing == f"at run time (not folded: {down.unfolded})"
    query = rows["encoder.layer.0.attention.self.query"]
    assert "native_layer_norm in encoder.layer.0.attention.output.LayerNorm" in query.unfolded


def test_pixels_are_an_example_too() -> None:
    vit = ViTModel(ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"})).eval().requires_grad_(False)
    rows = {row.name: row for row in qcompile.explain(vit).rows}
    assert rows["layers.0.attention.q_proj"].folded == 1


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)).requires_grad_(False)


def test_experts_are_listed_by_parameter_and_smoothed() -> None:
    rows = {row.name: row for row in qcompile.explain(mixtral()).rows if "experts" in row.name}
    mlp = "model.layers.0.mlp.experts"
    assert list(rows) == [f"{mlp}.gate_up_proj", f"{mlp}.down_proj"]
    assert all(row.kernel.startswith("grouped_") for row in rows.values())
    assert [row.shape for row in rows.values()] == ["4×256×64", "4×64×128"]
    assert rows[f"{mlp}.gate_up_proj"].into == ("model.layers.0.post_attention_layernorm.weight",)
    assert rows[f"{mlp}.down_proj"].into == (f"{mlp}.gate_up_proj",)
    assert all(row.folded == 1 for row in rows.values())


@pytest.mark.parametrize(("pattern", "kept"), [("*experts", 2), ("*gate_up_proj", 1), ("model.layers.0.mlp", 0)])
def test_experts_are_ignored_by_module_or_parameter(pattern: str, kept: int) -> None:
    found = [row for row in qcompile.explain(mixtral(), ignore=["lm_head", pattern]).rows if "experts" in row.name]
    assert [row.reason for row in found if not row.kernel] == ["its name matches an ignore pattern"] * kept


def test_experts_that_every_token_meets_are_listed_and_stay_in_float() -> None:
    def body(m: Any, x: Any) -> Any:
        return m.fc(torch.bmm(x.expand(3, *x.shape), m.up).sum(0))

    model = Body(body, fc=nn.Linear(16, 16), up=nn.Parameter(torch.randn(3, 16, 16))).requires_grad_(False)
    row, _ = qcompile.explain(model, {"x": torch.randn(4, 16)}).rows
    assert (row.shape, row.kernel, row.reason) == ("3×16×16", "", "a stack of matrices, no linear")


@pytest.mark.parametrize(("dtype", "activations"), [("int8", "token"), ("fp8", "static")])
def test_linears_that_the_model_holds_in_eight_bits_are_listed_as_they_are(dtype: str, activations: str) -> None:
    found = qcompile.explain(quantized(dtype, activations))
    rows = {row.name.removeprefix("model.layers.0."): row for row in found.rows}
    head = rows.pop("lm_head")
    assert (head.kernel, head.stored, head.reason) == ("", "", "the model is already quantized, without this one")
    assert [name.split(".")[1] for name in rows] == [f"{name}_proj" for name in (*"qkvo", "gate", "up", "down")]
    scheme = {"token": "int8, per token", "static": "fp8, per tensor, static"}[activations]
    assert {row.stored for row in rows.values()} == {scheme} == {found.scheme}
    assert {(row.smoothing, bool(row.kernel), row.folded) for row in rows.values()} == {("as stored", True, 0.0)}
    assert f"self_attn.q_proj  32×32  10.5%  stored in {scheme}, " in str(found)
    assert found.totals()["quantized"] == pytest.approx(1 - rows_share(found, "lm_head"))


def rows_share(found: Explanation, name: str) -> float:
    return sum(row.macs for row in found.rows if row.name == name) / sum(row.macs for row in found.rows)


def test_stored_experts_are_listed_by_parameter() -> None:
    model = qcompile.quantize(mixtral(), [torch.ones(1, 8, dtype=torch.int64)])
    rows = {row.name: row for row in qcompile.explain(model).rows if "experts" in row.name}
    assert [row.shape for row in rows.values()] == ["4×256×64", "4×64×128"]
    assert list(rows) == [f"model.layers.0.mlp.experts.{stack}" for stack in ("gate_up_proj", "down_proj")]
    assert {row.stored for row in rows.values()} == {"int8, per token"}
    assert all(row.kernel.startswith("grouped_") for row in rows.values())


def test_calls_of_one_linear_are_one_row() -> None:
    model = Body(lambda m, x: m.fc(torch.relu(m.fc(m.fc(x)))), fc=nn.Linear(16, 16)).requires_grad_(False)
    rows = qcompile.explain(model, {"x": torch.randn(4, 16)}).rows
    assert sum(row.calls for row in rows) == 3
    assert sum(row.macs for row in rows) == 3 * 4 * 16 * 16
    assert max(row.calls for row in rows) == 2, "two with one fate are one row"


@pytest.mark.parametrize("kind", [GatedMLP, Attention, PostNorm, ReluMLP])
def test_the_text_has_a_line_per_linear_and_the_totals(kind: type[nn.Module]) -> None:
    found = qcompile.explain(kind().requires_grad_(False), {"x": torch.randn(2, 5, 16)})
    *lines, totals = str(found).splitlines()
    notes = lines[len(found.rows) :]  # of a CPU that has not the best kernel
    assert [line.split("  ")[0] for line in lines[: len(found.rows)]] == [row.name for row in found.rows]
    assert len(notes) == len({(row.kernel, row.note) for row in found.rows if row.note})
    assert all(f" in {len(found.rows)}, first {found.rows[0].name}: " in note for note in notes)
    assert totals.startswith(f"{len(found.rows)} linears in 1 graphs")
    assert "quantized 100.0%" in totals


def test_json_holds_all_of_it() -> None:
    found = qcompile.explain(llama())
    parsed = json.loads(found.to_json())
    assert len(parsed["rows"]) == 8
    assert parsed["totals"] == found.totals()
    assert parsed["rows"][0]["smoothing"] == "folded into model.layers.0.input_layernorm.weight"


def test_the_graph_ties_parameters_to_linears() -> None:
    graph = qcompile.explain(llama()).to_networkx()
    norm = "model.layers.0.input_layernorm.weight"
    assert sorted(graph.successors(norm)) == [f"model.layers.0.self_attn.{name}_proj" for name in "kqv"]
    assert graph.nodes["lm_head"]["kernel"] == ""


def test_without_smoothing_nothing_is_smoothed() -> None:
    found = qcompile.explain(llama(), alpha=None)
    assert {row.smoothing for row in found.rows} == {"not smoothed"}
    assert found.totals()["folded"] == 0


def test_options_are_those_of_the_backend() -> None:
    found = qcompile.explain(llama(), dtype="fp8", activations="static", ignore=["*_proj"])
    assert isinstance(found, Explanation)
    assert found.scheme == "fp8, per tensor, static"
    assert [row.name for row in found.rows if row.kernel] == ["lm_head"]
    with pytest.raises(ConfigError, match="dtype must be one of"):
        qcompile.explain(llama(), dtype="int4")


def test_a_model_that_says_nothing_of_its_inputs_needs_an_example() -> None:
    with pytest.raises(ConfigError, match=r"Linear has no config; from Python, pass inputs=…"):
        qcompile.explain(nn.Linear(4, 4).requires_grad_(False))


def test_an_encoder_decoder_gets_both_inputs() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=50))
    assert set(example_call(model)) >= {"input_ids", "decoder_input_ids"}
    assert qcompile.explain(model.eval().requires_grad_(False)).totals()["quantized"] > 0.5


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown option 'bogus'"):
        qcompile.explain(llama(), bogus=1)


def test_a_gpu_that_is_not_here_is_explained() -> None:
    pytest.importorskip("triton")
    model = llama()
    for target, kernel, note in (("sm90", "triton", ""), ("sm75", "int_mm", "triton: needs an NVIDIA GPU")):
        found = qcompile.explain(model, target=target)
        quantized = [row for row in found.rows if row.kernel]
        assert {row.kernel for row in quantized} == {kernel}
        assert all(note in row.note and bool(row.note) == bool(note) for row in quantized)
        lines = str(found).splitlines()
        assert [line for line in lines if "needs an NVIDIA GPU" in line] == lines[len(found.rows) : -1]
        assert len(lines) == len(found.rows) + 1 + bool(note)
    with pytest.raises(LoweringError, match="fp8 needs compute capability 8.9"):
        qcompile.explain(model, target="sm80", dtype="fp8")
    with pytest.raises(ConfigError, match="such as sm90"):
        qcompile.explain(model, target="gpu")


def test_layers_that_share_a_graph_have_rows_of_their_own() -> None:
    model, x = Broken().eval(), torch.randn(4, 16)
    expected = [(f"layers.{i}.{fc}", 1) for i in range(3) for fc in ("fc1", "fc2")]
    found = qcompile.explain(model, {"x": x}, ignore=("layers.1.*",))
    assert [(row.name, row.calls) for row in found.rows] == expected
    assert [row.name for row in found.rows if not row.kernel] == ["layers.1.fc1", "layers.1.fc2"]
    assert found.graphs == 3
    stored = qcompile.explain(qcompile.quantize(model, [x], ignore=("layers.1.*",)), {"x": x})
    assert [row.name for row in stored.rows if row.stored] == [name for name, _ in expected if ".1." not in name]
