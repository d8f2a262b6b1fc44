"""Bisection names what was spoiled, and nothing else."""

import dataclasses
import functools
import json
import re
from typing import Any, ClassVar

import pytest
import torch
from checkpoints import llama
from subjects import THRESHOLD, WINDOWS, DropBias, calibration, sabotaged, subject, with_pass
from torch import nn
from torch.fx import GraphModule
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import qcompile
from qcompile.bisection.bisect import Bisection, bisect
from qcompile.config import Config
from qcompile.errors import CaptureError, ConfigError
from qcompile.pass_pipeline import PassResult

STATIC = {"activations": "static", "alpha": None}


def search(model: Any = None, **options: Any) -> Bisection:
    return bisect(subject() if model is None else model, WINDOWS, **{"threshold": THRESHOLD, **options})


@functools.cache
def spoiled(name: str) -> tuple[Bisection, list[str]]:
    """The search with one linear's ranges off, and what it told."""
    told: list[str] = []
    return search(calibration=sabotaged(name), told=told.append, **STATIC), told


def test_nothing_is_blamed_when_nothing_is_bad() -> None:
    found = search(calibration=calibration())
    assert 0 < found.whole.kl < THRESHOLD
    assert (found.step, found.culprits, found.variants) == (None, (), 1)
    assert found.verdict.startswith("nothing costs the accuracy: the whole is at KL 0.0")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"])
def test_a_linear_with_a_wrong_calibration_is_named(name: str) -> None:
    found, _ = spoiled(name)
    assert found.names == (name,)
    assert found.step is not None
    assert (found.step.text.partition("{")[0], found.step.exact) == ("quantize_linears", False)
    assert found.culprits[0].alone.kl > THRESHOLD
    assert found.rest is not None
    assert found.rest.kl < THRESHOLD
    assert found.none is not None
    assert abs(found.none.kl) < 1e-6
    assert found.linears == 14
    assert found.variants < 20


def test_several_linears_are_all_named() -> None:
    names = {"model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"}
    found = search(calibration=sabotaged(*names), **STATIC)
    assert set(found.names) == names
    assert len(found.culprits) == 3


def biased() -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.mul_(4)
        elif name.endswith("proj.bias"):
            parameter.normal_()
    model.lm_head.weight.mul_(8)
    return model


@pytest.mark.parametrize("after", ["canonicalize", "find_linears"])
def test_a_pass_that_drops_a_bias_is_named(after: str) -> None:
    found = search(biased(), pipeline=with_pass(Config(), DropBias(), after))
    assert found.step is not None
    assert (found.step.text, found.step.exact) == ("drop_bias", True)
    assert found.step.before.kl < 1e-6 < THRESHOLD < found.step.after.kl
    assert found.culprits == ()
    assert found.verdict == "pass drop_bias costs the accuracy, whatever is quantized"
    assert "exact, so this is its fault" in str(found)


def test_the_lowering_is_a_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompile.bisection import partial_pipeline

    real = partial_pipeline.lower

    def wrong(gm: Any, *rest: Any) -> Any:
        gm, chosen = real(gm, *rest)
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
            node.target = torch.ops.aten.sub.Tensor
        gm.recompile()
        return gm, chosen

    monkeypatch.setattr(partial_pipeline, "lower", wrong)
    found = search()
    assert found.step is not None
    assert found.step.text == "lower"
    assert (found.culprits, found.verdict) == ((), "pass lower costs the accuracy, whatever is quantized")
    assert found.step.index == len(qcompile.passes.quantizing(Config()).passes)


def test_the_search_ends_when_it_is_told_to() -> None:
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    found = search(calibration=sabotaged(*names), most=8, **STATIC)
    assert not found.complete
    assert "the most allowed" in str(found)
    assert set(found.names) & set(names)


def test_the_text_and_the_json_say_the_same() -> None:
    name = "model.layers.0.mlp.down_proj"
    found, _ = spoiled(name)
    values = json.loads(found.to_json())
    assert values["culprits"] == [{"linears": [name], "alone": vars(found.culprits[0].alone)}]
    assert values["verdict"] == found.verdict == f"{name}: 1 of 14 linears cost the accuracy"
    assert values["step"]["index"] == found.step.index  # type: ignore[union-attr]
    assert re.search(rf"KL +{found.whole.kl:.5f}  ΔNLL +[+-][\d.]+  everything quantized", str(found))


def test_the_model_is_left_as_it_was() -> None:
    model = biased()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    search(model, threshold=1e-5, most=6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


CONV1D = [("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")]


def test_gpt2_whose_linears_are_conv1d_and_whose_head_is_tied() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=64)
    found = search(GPT2LMHeadModel(config).eval().requires_grad_(False), threshold=0.0)
    assert found.linears == 4
    assert set(found.names) <= {f"transformer.h.0.{n}.{m}" for n, m in CONV1D}


def test_an_encoder_decoder_model_reads_halves_of_a_window() -> None:
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=64, decoder_start_token_id=0,
        dropout_rate=0.0,
    )  # fmt: skip
    found = search(T5ForConditionalGeneration(config).eval().requires_grad_(False), threshold=1e9)
    assert found.tokens == 2 * 11


@dataclasses.dataclass(frozen=True)
class LogOfNegatives(DropBias):
    name: ClassVar[str] = "log_of_negatives"

    def run(self, gm: GraphModule) -> PassResult:
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.silu.default):
            node.target = torch.ops.aten.log.default
        return PassResult(1)


def test_logits_that_are_not_finite_are_bad_and_json_stays_json() -> None:
    found = search(pipeline=with_pass(Config(), LogOfNegatives(), "find_linears"))
    assert found.step is not None
    assert found.step.text == "log_of_negatives"
    assert found.whole.kl == float("inf")
    assert json.loads(found.to_json())["whole"] == {"kl": None, "nll": None}


def test_a_model_with_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(ConfigError, match="^no linear of LlamaForCausalLM would be quantized"):
        search(ignore=("*",))


def test_a_float_model_that_is_broken_is_refused() -> None:
    model = biased()
    model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="^the float model's logits must be finite"):
        search(model)


class NoLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(64, 8), nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(self.embed(input_ids))
        return y


class Broken(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> Any:
        torch._dynamo.graph_break()
        output = self.inner(input_ids=input_ids, use_cache=False)
        torch._dynamo.graph_break()
        output.logits = output.logits * 1.5
        return output


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"threshold": -1.0}, ConfigError, "threshold must be a KL in nats per token, 0 or more; got -1.0"),
        ({"threshold": float("nan")}, ConfigError, "threshold must be a KL"),
        ({"most": 0}, ConfigError, "the most variants to run must be at least 1; got 0"),
        ({"calibrate": 3}, ConfigError, "bisect takes a calibration that is there; got calibrate"),
        ({"alpha": 0.5}, ConfigError, "alpha=0.5 needs activation statistics"),
        ({"model": NoLogits()}, ConfigError, "a model must give logits for every token to be scored"),
        ({"against": llama(), "alpha": None}, ConfigError, "leave the passes and options out"),
        ({"against": llama()}, ConfigError, "has no quantized linear; bisect a float model without against"),
    ],
)
def test_mistakes(options: dict[str, Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=re.escape(reason)):
        search(**options)


def test_a_model_in_pieces_is_refused() -> None:
    with pytest.raises(CaptureError, match="^bisect needs the model in one graph; Broken gave 2; "):
        search(Broken(subject()))


def test_a_quantized_model_needs_its_original() -> None:
    from checkpoints import quantized

    with pytest.raises(ConfigError, match="pass it as against"):
        search(quantized())


def test_progress_is_told() -> None:
    _, told = spoiled("model.layers.0.mlp.down_proj")
    assert told[0] == "after 9 of 9 passes"
    assert "7 of 14 linears quantized" in told
