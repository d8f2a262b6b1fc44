"""Patterns of strangers: matched like `re` does, or refused in one line, soon."""

import re
import time
from typing import Any

import pytest
import regex

from qcompile.checkpoint.patterns import LARGEST, Patterns
from qcompile.errors import CheckpointError

NAMES = ["lm_head", "model.layers.0.mlp.gate", "model.layers.10.self_attn.q_proj", "visual.blocks.1.fc"]


@pytest.mark.parametrize(
    "pattern",
    [
        ".*lm_head", "lm_head$", r"model\.layers\.\d+\.mlp\..*", r"model\.layers\.[0-9]{1,2}\.", "visual.*",
        ".*mlp.gate$", ".*(q|k|v)_proj", "^(?!.*(mlp|attn)).*$", "(?i)LM_HEAD", "",
    ],
)  # fmt: skip
def test_as_re_matches(pattern: str) -> None:
    patterns = Patterns()
    assert [patterns.match(pattern, name) for name in NAMES] == [bool(re.match(pattern, name)) for name in NAMES]


def test_no_hang() -> None:
    began, patterns = time.monotonic(), Patterns(seconds=0.5)
    with pytest.raises(CheckpointError, match=r"must match in 0\.5 s; '\.\*\(a\|aa\)\+\$' does not; write"):
        patterns.match(".*(a|aa)+$", "a" * 100 + ".b")
    assert time.monotonic() - began < 20


def test_all_matches_share_the_time() -> None:
    patterns = Patterns(seconds=0.01)

    def many() -> None:
        for _ in range(100_000):
            patterns.match(".*q_proj", NAMES[2])

    with pytest.raises(CheckpointError, match=r"must match in 0\.01 s"):
        many()


def test_thousands_of_patterns_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_one = regex.compile

    def noted(pattern: str) -> Any:
        compiled.append(pattern)
        return compile_one(pattern)

    monkeypatch.setattr(regex, "compile", noted)
    patterns, wanted = Patterns(seconds=60), [rf"model\.experts\.{number}\.up" for number in range(1000)]
    for name in NAMES:
        assert not any(patterns.match(pattern, name) for pattern in wanted)
    assert compiled == wanted


@pytest.mark.parametrize(
    "pattern", ["x{4000000000}", "((x{99}){99}){99}", "(?x)(x) { 100 } (?#c){ 1000 }", "a" * (LARGEST + 1)]
)
def test_what_would_be_large_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="at most 10000 characters"):
        Patterns().match(pattern, "x")


@pytest.mark.parametrize("pattern", ["(", "(?R)", "*", "(" * 9000, "(?<=a*)b", r"\L<x>", "[z-a]"])
def test_what_is_not_regular_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="must be regular"):
        Patterns().match(pattern, "x")
