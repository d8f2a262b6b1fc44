"""Compiled generate: the tokens of the model's own generate, in the shapes that were compiled at the start."""

import copy
from typing import Any

import pytest
import torch
from checkpoints import IDS, tokenizer
from tolerances import assert_close
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.errors import ConfigError
from qcompile.generation.generate import CompiledGeneration
from qcompile.model_limits import cache_name

LENGTH = 48


@pytest.fixture(scope="module")
def model() -> Any:
    """Logits far enough apart that a rounding flip cannot change the likeliest token."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return qcompile.quantize(LlamaForCausalLM(config).eval(), [IDS, IDS.flip(1)])


@pytest.fixture(scope="module")
def compiled(model: Any) -> CompiledGeneration:
    torch._dynamo.reset()
    made = CompiledGeneration(copy.deepcopy(model), LENGTH, inner="eager")
    made.warm_up((3, 1))
    return made


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Not reset between tests here: the compiled model is shared."""


def prompt(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def expected(model: Any, ids: Tensor, **keywords: Any) -> Any:
    with torch.no_grad():
        return model.generate(ids, **keywords)


def test_one_graph_per_length_and_one_for_decoding(compiled: CompiledGeneration) -> None:
    assert compiled._lengths == (49, 32, 16)
    assert compiled.compilations.count == 2 * (3 + 1)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 40, 47])
def test_any_prompt_length(model: Any, compiled: CompiledGeneration, length: int) -> None:
    before, ids = compiled.compilations.count, prompt(length, seed=length)
    new = min(8, LENGTH - length)
    found = compiled.model.generate(ids, max_new_tokens=new, do_sample=False)
    assert torch.equal(found, expected(model, ids, max_new_tokens=new, do_sample=False))
    assert compiled.compilations.count == before


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_batches_are_filled_up(model: Any, compiled: CompiledGeneration, rows: int) -> None:
    before, ids = compiled.compilations.count, prompt(9, rows, seed=5)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found = compiled.model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected(model, ids, attention_mask=mask, max_new_tokens=6, do_sample=False))
    assert compiled.compilations.count == before


def test_sampling_of_one_row_draws_what_the_model_draws(model: Any, compiled: CompiledGeneration) -> None:
    before, ids = compiled.compilations.count, prompt(5)
    torch.manual_seed(4)
    found = compiled.model.generate(ids, max_new_tokens=20, do_sample=True, temperature=0.7, top_k=0)
    torch.manual_seed(4)
    assert torch.equal(found, expected(model, ids, max_new_tokens=20, do_sample=True, temperature=0.7, top_k=0))
    assert compiled.compilations.count == before


def test_stop_strings_and_processors(model: Any, compiled: CompiledGeneration) -> None:
    from tokenizers import decoders

    before, ids, reader = compiled.compilations.count, prompt(6, seed=2), tokenizer()
    reader.backend_tokenizer.decoder = decoders.Fuse()  # no spaces between letters
    plain = expected(model, ids, max_new_tokens=12, do_sample=False, repetition_penalty=1.5)
    stop = [reader.decode(plain[0, 10:12])]
    found = compiled.model.generate(
        ids, max_new_tokens=12, do_sample=False, repetition_penalty=1.5, stop_strings=stop, tokenizer=reader
    )
    assert found.shape[1] < plain.shape[1]
    assert torch.equal(found, plain[:, : found.shape[1]])
    assert compiled.compilations.count == before


def test_beams_and_results_as_dicts(model: Any, compiled: CompiledGeneration) -> None:
    before, ids = compiled.compilations.count, prompt(7, seed=3)
    keywords = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    assert torch.equal(compiled.model.generate(ids, **keywords), expected(model, ids, **keywords))
    found = compiled.model.generate(
        ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(found.sequences, expected(model, ids, max_new_tokens=6, do_sample=False))
    assert len(found.scores) == 6
    assert compiled.compilations.count == before


class Watching:
    """Callbacks of a caller's own, which write down what they are shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def stop(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.seen.append(("stop", ids.tolist()))
        return torch.full((len(ids),), ids.shape[1] >= 14)

    def process(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(("process", ids.tolist(), tuple(scores.shape)))
        return scores

    def allow(self, row: int, ids: Tensor) -> list[int]:
        self.seen.append(("allow", row, ids.tolist()))
        return list(range(3, 30))

    def keywords(self) -> dict[str, Any]:
        return {
            "stopping_criteria": [self.stop], "logits_processor": [self.process],
            "prefix_allowed_tokens_fn": self.allow, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2,
        }  # fmt: skip


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_callbacks_see_what_transformers_shows_them(
    model: Any, compiled: CompiledGeneration, rows: int, beams: int
) -> None:
    ids, ours, theirs = prompt(9, rows, seed=7), Watching(), Watching()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    common = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    found = compiled.model.generate(ids, **common, **ours.keywords())
    assert torch.equal(found, expected(model, ids, **common, **theirs.keywords()))
    assert ours.seen == theirs.seen
    assert found.shape[1] == 14


def test_arguments_by_position(model: Any, compiled: CompiledGeneration) -> None:
    ids, config, ours, theirs = prompt(6), GenerationConfig(max_new_tokens=7, do_sample=False), Watching(), Watching()
    found = compiled.model.generate(ids, config, [ours.process], [ours.stop], ours.allow)
    with torch.no_grad():
        assert torch.equal(found, model.generate(ids, config, [theirs.process], [theirs.stop], theirs.allow))
    assert ours.seen == theirs.seen


def test_padding_that_transformers_finds_by_itself(model: Any, compiled: CompiledGeneration) -> None:
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt(5)], dim=1)
    keywords = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(compiled.model.generate(ids, **keywords), expected(model, ids, **keywords))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_caches_that_ours_stands_for(model: Any, compiled: CompiledGeneration, kind: str) -> None:
    before, ids = compiled.compilations.count, prompt(5)
    keywords = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": kind}
    assert torch.equal(compiled.model.generate(ids, **keywords), expected(model, ids, **keywords))
    assert compiled.compilations.count == before


def test_results_as_dicts_hold_no_padding(model: Any, compiled: CompiledGeneration) -> None:
    before, ids = compiled.compilations.count, prompt(7, 2, seed=8)
    keywords = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    wanted = {"output_scores": True, "output_logits": True}
    found, plain = compiled.model.generate(ids, **keywords, **wanted), expected(model, ids, **keywords, **wanted)
    assert compiled.compilations.count == before
    for name in ("scores", "logits"):
        for ours, theirs in zip(found[name], plain[name], strict=True):
            assert_close("inductor/float32", actual=ours, expected=theirs)
    cache = found.past_key_values
    assert type(cache) is DynamicCache
    for ours, theirs in zip(cache.layers, plain.past_key_values.layers, strict=True):
        assert_close("inductor/float32", actual=ours.keys, expected=theirs.keys)
        assert_close("inductor/float32", actual=ours.values, expected=theirs.values)


def test_hidden_states_and_attention_hold_no_padding(model: Any, compiled: CompiledGeneration) -> None:
    ids = prompt(7, 2, seed=8)
    keywords = {
        "max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True,
        "output_attentions": True,
    }  # fmt: skip
    for each in (compiled.model, model):
        each.set_attn_implementation("eager")
    found, plain = compiled.model.generate(ids, **keywords), expected(model, ids, **keywords)
    for each in (compiled.model, model):
        each.set_attn_implementation("sdpa")
    for name in ("hidden_states", "attentions"):
        for step, same in zip(found[name], plain[name], strict=True):
            for ours, theirs in zip(step, same, strict=True):
                assert_close("inductor/float32", actual=ours, expected=theirs)


def test_a_filled_batch_draws_what_the_model_draws(model: Any, compiled: CompiledGeneration) -> None:
    before, ids = compiled.compilations.count, prompt(5)
    keywords = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "num_return_sequences": 2}
    torch.manual_seed(4)
    found = compiled.model.generate(ids, **keywords)
    torch.manual_seed(4)
    assert torch.equal(found, expected(model, ids, **keywords))
    assert compiled.compilations.count == before


def test_a_streamer_sees_no_padding(compiled: CompiledGeneration) -> None:
    class Keep:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    keep, ids = Keep(), prompt(6)
    found = compiled.model.generate(ids, max_new_tokens=5, do_sample=False, streamer=keep)
    assert keep.seen == [*found[0].tolist(), -1]


def test_lengths_as_transformers_counts_them(compiled: CompiledGeneration) -> None:
    ids = prompt(10)
    assert compiled.model.generate(ids, max_length=16, do_sample=False).shape[1] == 16
    assert compiled.model.generate(ids, min_length=18, max_new_tokens=9, do_sample=False).shape[1] == 19
    config = GenerationConfig(max_new_tokens=30, do_sample=False)  # a default gives way
    assert compiled.model.generate(prompt(45), generation_config=config).shape[1] == LENGTH


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"max_new_tokens": 40}, r"at most 48 tokens; got 10 of prompt and 40 new"),
        ({"max_length": 49}, "got max_length=49; shorten them"),
    ],
)
def test_no_room(compiled: CompiledGeneration, keywords: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compiled.model.generate(prompt(10), **keywords)


def test_a_cache_of_the_callers_own(model: Any, compiled: CompiledGeneration) -> None:
    """By the name that this transformers has for it; nothing is padded then, so it goes on where it ended."""
    ids = prompt(5, seed=2)
    name, cache = cache_name(model.prepare_inputs_for_generation), DynamicCache(config=model.config)
    found = compiled.model.generate(ids, max_new_tokens=4, do_sample=False, **{name: cache})
    assert torch.equal(found, expected(model, ids, max_new_tokens=4, do_sample=False))
    assert cache.get_seq_length() == 5 + 4 - 1


def test_no_prompt(compiled: CompiledGeneration) -> None:
    with pytest.raises(ConfigError, match=r"prompts of 1…47 tokens; got 0"):
        compiled.model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=1)


def test_a_sliding_window_shorter_than_the_prompt() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch._dynamo.reset()
    config = MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0, eos_token_id=None,
        sliding_window=6,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = qcompile.quantize(MistralForCausalLM(config).eval(), [IDS, IDS.flip(1)])
    sliding = CompiledGeneration(copy.deepcopy(plain), 24, inner="eager")
    sliding.warm_up()
    before = sliding.compilations.count
    for length in (3, 12, 17):
        ids = prompt(length, seed=length)
        found = sliding.model.generate(ids, max_new_tokens=7, do_sample=False)
        assert torch.equal(found, expected(plain, ids, max_new_tokens=7, do_sample=False))
    assert sliding.compilations.count == before == 3


def test_recurrent_models_are_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ConfigError, match=r"attention; MambaForCausalLM is recurrent; call its generate uncompiled"):
        CompiledGeneration(mamba, 16, inner="eager")
