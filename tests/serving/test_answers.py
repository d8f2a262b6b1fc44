"""Answers, read with the official package."""

from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from qcompile.serving.answers import Style
from qcompile.serving.sampling import Choice

TOKENS = [(Choice(1, -0.5, ((1, -0.5), (2, -1.0))), "ab"), (Choice(2, -0.1, ((2, -0.1),)), "c")]


def style(chat: bool) -> Style:
    return Style(chat=chat, ident="x", created=1, model="m", name=lambda token: f"t{token}")


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
