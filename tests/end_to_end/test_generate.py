"""transformers' generate through the backend, in the ways docs/generate.md describes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, StaticCache

from qcompile import backend
from qcompile.weights import STORE

NEW_TOKENS = 10
PROMPTS = (torch.arange(1, 10)[None], torch.arange(20, 34)[None])


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every graph the backend compiles, from a clean Dynamo."""
    torch._dynamo.reset()
    compiled: list[Any] = []
    original = backend.CompiledGraph.__init__

    def counted(self: Any, *args: Any, **options: Any) -> None:
        compiled.append(self)
        original(self, *args, **options)

    monkeypatch.setattr(backend.CompiledGraph, "__init__", counted)
    yield compiled
    torch._dynamo.reset()


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,  # logits far enough apart that a rounding flip cannot change the argmax
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def options() -> dict[str, Any]:
    return {"inner": "eager"}


def decode_only() -> CompileConfig:
    config = CompileConfig(backend="w8a8", options=options())
    config.mode = None  # type: ignore[assignment]
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


def generate(model: LlamaForCausalLM, prompt: Tensor, **keywords: Any) -> list[int]:
    ids = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, **keywords)
    return ids[0, prompt.shape[1] :].tolist()


def step_by_hand(prefill: Any, decode: Any, model: LlamaForCausalLM, prompt: Tensor) -> list[int]:
    """Greedy decoding with an explicit static cache, prompt by `prefill`, each further token by `decode`."""
    length = prompt.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=length + NEW_TOKENS)
    logits = prefill(input_ids=prompt, past_key_values=cache, use_cache=True).logits
    tokens = [int(logits[0, -1].argmax())]
    while len(tokens) < NEW_TOKENS:
        position = torch.tensor([[length + len(tokens) - 1]])
        last = torch.tensor([[tokens[-1]]])
        logits = decode(input_ids=last, past_key_values=cache, position_ids=position, use_cache=True).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("cache", ["static", None])
def test_in_place_compile_covers_prefill_and_decode(graphs: list[Any], cache: str | None) -> None:
    model = tiny_llama()
    model.compile(backend="w8a8", options=options())
    computed = STORE.computed
    keywords = {"cache_implementation": cache} if cache else {}
    texts = [generate(model, prompt, **keywords) for prompt in PROMPTS]
    bound = 4 if cache else 5
    assert 2 <= len(graphs) <= bound
    assert all(graph.stages.kernels for graph in graphs), "every graph holds quantized products"
    once = len(graphs[0].partition.prepared)
    assert STORE.computed - computed == once, "one set of weights serves prefill, decode and every shape"
    assert [generate(model, prompt, **keywords) for prompt in PROMPTS] == texts
    assert len(graphs) <= bound, "no compilation once both lengths were seen"


def test_static_generate_equals_stepping_by_hand(graphs: list[Any]) -> None:
    model = tiny_llama()
    model.compile(backend="w8a8", options=options())
    for prompt in PROMPTS:
        by_generate = generate(model, prompt, cache_implementation="static")
        with torch.no_grad():
            assert step_by_hand(model, model, model, prompt) == by_generate


def test_decode_only_equals_stepping_with_float_prefill(graphs: list[Any]) -> None:
    model = tiny_llama()
    by_generate = [
        generate(model, prompt, cache_implementation="static", compile_config=decode_only()) for prompt in PROMPTS
    ]
    assert 1 <= len(graphs) <= 2
    compiled = torch.compile(model, backend="w8a8", options=options())
    with torch.no_grad():
        by_hand = [step_by_hand(model, compiled, model, prompt) for prompt in PROMPTS]
    assert by_hand == by_generate


def test_generate_on_the_compiled_wrapper_reaches_no_backend(graphs: list[Any]) -> None:
    model = tiny_llama()
    compiled = torch.compile(model, backend="w8a8", options=options())
    text = compiled.generate(PROMPTS[0], max_new_tokens=2, do_sample=False)
    assert not graphs, "if this ever fails, PyTorch or transformers closed the trap: update docs/generate.md"
    assert text.shape[1] == PROMPTS[0].shape[1] + 2
