"""Answers, read with the official package."""

import json
import math

from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from qcompile.serving.answers import Style
from qcompile.serving.sampling import Choice
from qcompile.serving.spelling import Spelling

TOKENS = [(Choice(1, -0.5, ((1, -0.5), (2, -1.0))), "ab"), (Choice(2, -0.1, ((2, -0.1),)), "c")]


def spell(token: int) -> Spelling:
    return Spelling("same", b"\xe2", "same") if token > 9 else Spelling(f"t{token}", b"t", f"▁t{token}")


def style(chat: bool) -> Style:
    return Style(chat=chat, ident="x", created=1, model="m", spell=spell)


def test_completion() -> None:
    choice = style(False).choice(0, "abc", "stop", TOKENS, logprobs=True)
    read = Completion.model_validate(style(False).whole([choice], 3, 2))
    assert read.usage is not None
    assert read.usage.total_tokens == 5
    assert read.choices[0].logprobs is not None
    assert read.choices[0].logprobs.text_offset == [0, 2]


def test_chat_and_its_chunks() -> None:
    choice = style(True).choice(0, "abc", "length", TOKENS, logprobs=True)
    read = ChatCompletion.model_validate(style(True).whole([choice], 3, 2))
    assert read.choices[0].logprobs is not None
    assert read.choices[0].logprobs.content is not None
    assert [t.token for t in read.choices[0].logprobs.content] == ["t1", "t2"]
    chunk = style(True).piece(0, "abc", None, TOKENS, 0, logprobs=False, usage_follows=True)
    assert ChatCompletionChunk.model_validate(chunk).choices[0].delta.content == "abc"
    assert chunk["usage"] is None


def test_no_alternative_is_lost_and_none_is_infinite() -> None:
    best = ((10, -0.5), (11, -1.0), (12, -math.inf), (1, -math.inf))
    tokens = [(Choice(10, -math.inf, best), "")]
    choice = style(False).choice(0, "", "stop", tokens, logprobs=True)
    assert choice["logprobs"]["top_logprobs"] == [
        {"same": -0.5, "token_id:11": -1.0, "token_id:12": -9999.0, "t1": -9999.0}
    ]
    assert choice["logprobs"]["token_logprobs"] == [-9999.0]
    entry = style(True).choice(0, "", "stop", tokens, logprobs=True)["logprobs"]["content"][0]
    assert [alternative["logprob"] for alternative in entry["top_logprobs"]] == [-0.5, -1.0, -9999.0, -9999.0]
    assert entry["bytes"] == [0xE2]
    json.dumps([choice, entry], allow_nan=False)
