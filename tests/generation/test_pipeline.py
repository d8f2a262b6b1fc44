"""qcompile.pipeline: a transformers pipeline that compiles nothing once it is there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import llama, quantized, tokenizer
from transformers import TextGenerationPipeline

import qcompile
from qcompile.errors import CheckpointError, ConfigError
from qcompile.generation.pipeline import LENGTH, checked_length

PROMPTS = ["the quick", "a", "over the lazy dog and then"]
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "tiny"
    qcompile.save_pretrained(quantized(), path, tokenizer=tokenizer())
    return path


def test_lists_chats_and_streams_without_compiling(folder: Path) -> None:
    torch._dynamo.reset()
    steps: list[tuple[int, int, str]] = []
    pipe = qcompile.pipeline(
        folder, max_length=64, batch_size=2, inner="eager", told=lambda *step: steps.append(step)
    )
    assert isinstance(pipe, TextGenerationPipeline)
    assert steps[0] == (0, 6, "2 × 63")  # the longest first
    assert steps[-1] == (6, 6, "ready")
    count = pipe.model.compiled_generation.compilations.count
    found = [result[0]["generated_text"] for result in pipe(PROMPTS, **GREEDY)]
    one_by_one = [pipe(prompt, batch_size=1, **GREEDY)[0]["generated_text"] for prompt in PROMPTS]
    assert found == one_by_one
    model, reader = qcompile.from_pretrained(folder), tokenizer()
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = reader(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            expected = model.generate(**ids, **GREEDY)
        made = reader.decode(expected[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.removeprefix(prompt).split() == made.split()
    answer = pipe([{"role": "user", "content": "hello"}], **GREEDY)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
    assert pipe.model.compiled_generation.compilations.count == count


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size must be at least 1; got 0"):
        qcompile.pipeline(folder, batch_size=0)
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        qcompile.pipeline(quantized())
    with pytest.raises(CheckpointError):
        qcompile.pipeline(tmp_path / "nothing")
    llama().save_pretrained(tmp_path / "float")
    tokenizer().save_pretrained(tmp_path / "float")
    with pytest.raises(CheckpointError, match="qcompile quantize"):
        qcompile.pipeline(tmp_path / "float")


def test_lengths() -> None:
    assert checked_length(None, None) == LENGTH
    assert checked_length(None, 512) == 512
    assert checked_length(None, 1 << 20) == LENGTH
    assert checked_length(512, 512) == 512
    for wanted in (1, 513):
        with pytest.raises(ConfigError, match=f"2…512, the model's positions; got {wanted}"):
            checked_length(wanted, 512)
