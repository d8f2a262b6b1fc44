"""One token by itself, as log-probabilities report it: some tokens are no text, but a part of a character's bytes."""

import dataclasses
import functools
import re
from typing import Any

from qcompile.serving.incremental_text import UNFINISHED

FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's name for a byte


@dataclasses.dataclass(frozen=True)
class Spelling:
    """text: escapes (\\xe2\\x82) where the bytes are not whole characters. piece: its name in the vocabulary, which
    no other token has."""

    text: str
    raw: bytes
    piece: str


def spelling(tokenizer: Any, token: int) -> Spelling:
    """How a tokenizer spells a token in the middle of a text. Not thread-safe, as tokenizers are not."""
    piece = tokenizer.convert_ids_to_tokens(token) or f"token_id:{token}"  # vocabularies have less than embeddings do
    once, twice = (str(tokenizer.decode([token] * count)) for count in (1, 2))
    text = twice.removeprefix(once) if twice.startswith(once) else once  # decoders drop the first token's space
    raw = _bytes_of(piece) if UNFINISHED in text else None
    if raw is None:
        return Spelling(text, text.encode(), piece)
    return Spelling("".join(f"\\x{byte:02x}" for byte in raw), raw, piece)


def _bytes_of(piece: str) -> bytes | None:
    """The bytes that a piece stands for; None if it stands for itself."""
    if found := FALLBACK.fullmatch(piece):
        return bytes.fromhex(found[1])
    letters = byte_letters()
    return bytes(letters[letter] for letter in piece) if letters.keys() >= set(piece) else None


@functools.cache
def byte_letters() -> dict[str, int]:
    """The letters that byte-level BPE writes bytes with: printable Latin-1 as it is, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}
