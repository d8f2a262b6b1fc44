"""Text as it comes."""

from typing import Any

import pytest

from qcompile.serving.incremental_text import IncrementalText


class Bytes:
    """One token per byte of UTF-8."""

    def decode(self, tokens: list[int], **options: Any) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def pieces(text: str, *stops: str) -> tuple[list[str], bool]:
    incremental, found = IncrementalText(Bytes(), stops), []
    for token in text.encode():
        found.append(incremental.push(token))
        if incremental.stopped:
            return found, True
    return [*found, incremental.finish()], incremental.stopped


@pytest.mark.parametrize("text", ["plain", "größer", "日本語 text 🦊!"])
def test_pieces_are_whole_characters_and_add_up(text: str) -> None:
    found, _ = pieces(text)
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


def test_an_unfinished_character_at_the_end_comes_out() -> None:
    incremental = IncrementalText(Bytes())
    assert incremental.push("ö".encode()[0]) == ""
    assert incremental.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [("one two", ("tw",), "one "), ("ababac!", ("abac",), "ab"), ("xyz", ("yz", "xy"), ""), ("ab", ("abc",), "ab")],
)
def test_stop_strings_are_cut_off_and_never_shown(text: str, stops: tuple[str, ...], expected: str) -> None:
    found, stopped = pieces(text, *stops)
    assert "".join(found) == expected
    assert stopped == any(stop in text for stop in stops)


def test_the_space_between_prompt_and_text_stays() -> None:
    """Decoders of SentencePiece drop a space that begins a text, so the prompt must be seen."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"\u2581The": 0, "\u2581moon": 1, "\u2581is": 2, "<unk>": 3}, unk_token="<unk>"))
    raw.decoder = decoders.Metaspace()
    reader = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    after = IncrementalText(reader, before=[2] * 20 + [0])
    assert [after.push(1), after.push(2), after.finish()] == [" moon", " is", ""]
    alone = IncrementalText(reader)
    assert [alone.push(1), alone.push(2)] == ["moon", " is"]
