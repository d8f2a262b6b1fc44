"""Bytes of tokens, put together, are those of the text, whichever way a tokenizer has of writing bytes."""

from typing import Any

import pytest
from checkpoints import tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qcompile.serving.spelling import byte_letters, spelling

TEXT = "to be €5, né 🙂 or � to"


def byte_level() -> Any:
    """Byte-level BPE, as GPT-2's: some tokens are two of a character's three bytes."""
    letters = {letter: at for at, letter in enumerate(byte_letters())}
    names = {byte: letter for letter, byte in byte_letters().items()}
    merge = (names[0xE2], names[0x82])
    model = Tokenizer(models.BPE(vocab={**letters, "".join(merge): 256}, merges=[merge]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model)


def byte_fallback() -> Any:
    """SentencePiece's way, as Llama's: bytes only for what is not in the vocabulary."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"tobrn,", "�"]
    vocabulary = {piece: at for at, piece in enumerate(pieces)}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=model)


@pytest.mark.parametrize("made", [byte_level(), byte_fallback()], ids=["byte-level", "byte fallback"])
def test_bytes_make_up_the_text(made: Any) -> None:
    spelled = [spelling(made, token) for token in made(TEXT)["input_ids"]]
    assert b"".join(each.raw for each in spelled).decode().strip() == TEXT
    assert "\\xe2\\x82" in "".join(each.text for each in spelled)
    assert "�" not in [each.text for each in spelled if len(each.raw) < 3]
    assert len({each.text for each in spelled}) == len({each.raw for each in spelled})


def test_byte_letters_are_gpt2s() -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_letters() == {letter: byte for byte, letter in bytes_to_unicode().items()}


def test_plain_tokens_and_what_no_vocabulary_has() -> None:
    made = tokenizer()
    letter = made("a")["input_ids"][-1]
    assert spelling(made, letter).raw.strip() == b"a"
    assert spelling(made, 60).piece == "token_id:60"
