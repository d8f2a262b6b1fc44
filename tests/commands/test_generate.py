"""`qcompile generate`, as a user runs it: the completion on standard output, everything else on standard error."""

import io
from pathlib import Path

import pytest
import torch
from checkpoints import quantized, tokenizer

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
