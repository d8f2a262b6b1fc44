"""`qcompile generate`, as a user runs it: the completion on standard output, everything else on standard error."""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IDS, edit_json, llama, quantized, tokenizer

import qcompile
from qcompile import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate") / "tiny"
    qcompile.save_pretrained(quantized(), path, tokenizer=tokenizer())
    return path


def run(folder: Path, *options: str) -> int:
    small = ["--inner", "eager", "--max-length", "32", "--max-new-tokens", "6"]
    return cli.main(["generate", str(folder), *small, *options])


def expected(folder: Path, prompt: str) -> str:
    model, reader = qcompile.from_pretrained(folder), tokenizer()
    ids = reader(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        found = model.generate(**ids, max_new_tokens=6, do_sample=False)
    text: str = reader.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def test_greedy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--prompt", "the quick") == 0
    assert capsys.readouterr().out.strip() == expected(folder, "the quick").strip()


def test_chat_from_standard_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert run(folder, "--prompt", "-", "--chat") == 0
    assert capsys.readouterr().out.strip() == expected(folder, "user: hello\n").strip()


@pytest.mark.parametrize("temperature", ["1e-46", "1e-37", "5e-324"])
def test_next_to_no_temperature_is_greedy(
    folder: Path, temperature: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--prompt", "the quick", "--temperature", temperature) == 0
    assert capsys.readouterr().out.strip() == expected(folder, "the quick").strip()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input_that_is_no_text(
    folder: Path, errors: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8", errors=errors))
    assert run(folder, "--prompt", "-") == 2
    error = capsys.readouterr().err
    assert error.startswith("qcompile: standard input must be text in UTF-8; ")
    assert error.count("\n") == 1


def test_a_seed_repeats(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert run(folder, "--prompt", "over", "--temperature", "3", "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", ""], "prompt must hold at least one token"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be 0…100; got -1.0"),
        (["--prompt", "a", "--top-p", "0.5"], "top-p goes with a temperature; got 0.5 and none; pass --temperature"),
        (["--prompt", "a", "--stop", ""], "argument --stop: must be a text of at least one character; it is empty"),
        (["--prompt", "a", "--top-p", "0"], "top-p must be above 0 and at most 1; got 0.0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "argument --max-new-tokens: must be a whole number, at least 1"),
        (["--prompt", "a", "--max-new-tokens", "999"], "must have at most 32 tokens; got 1 of prompt and 999 new"),
        (["--prompt", "a", "--max-length", "129"], "max-length must be 2…128"),
    ],
)
def test_mistakes(folder: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, *options) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("qcompile: ")
    assert said in message


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "changed"))


@pytest.mark.parametrize("own", [
    {"num_beams": 3}, {"repetition_penalty": 30.0}, {"cache_implementation": "quantized"}, {"min_new_tokens": 6},
    {"do_sample": True, "temperature": 50.0}, {"max_length": 2}, {"num_return_sequences": 2, "do_sample": True},
    {"return_dict_in_generate": True}, {"suppress_tokens": [*range(3, 30)]},
], ids=str)  # fmt: skip
def test_settings_of_the_model_do_not_count(
    own: dict[str, Any], folder: Path, changed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = expected(folder, "the quick").strip()
    edit_json(changed / "generation_config.json", **own)
    assert run(changed, "--prompt", "the quick") == 0
    assert capsys.readouterr().out.strip() == text


def test_tokens_that_end_a_text_are_the_models_own(changed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(changed, "--prompt", "the quick") == 0
    first = capsys.readouterr().out.split()[0]
    (end,) = tokenizer()(first, add_special_tokens=False)["input_ids"]
    edit_json(changed / "generation_config.json", eos_token_id=[2, end])
    assert run(changed, "--prompt", "the quick") == 0
    assert capsys.readouterr().out.split() == [first]
    edit_json(changed / "generation_config.json", eos_token_id="</s>")
    assert run(changed, "--prompt", "the quick") == 2
    assert "eos_token_id of generation_config.json must be token numbers; got '</s>'" in capsys.readouterr().err


def test_a_model_that_generates_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = qcompile.quantize(llama().model, [IDS])
    qcompile.save_pretrained(model, tmp_path / "headless", tokenizer=tokenizer())
    assert run(tmp_path / "headless", "--prompt", "a") == 2
    assert "LlamaModel has no language-model head for it" in capsys.readouterr().err
