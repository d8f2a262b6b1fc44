"""What is refused, and how."""

import json
from typing import Any

import pytest

from qcompile.serving.protocol import ApiError, ChatRequest, CompletionRequest, parse


def completion(**fields: Any) -> Any:
    return parse(CompletionRequest, json.dumps({"model": "m", "prompt": "p", **fields}).encode())


def test_defaults_and_forms_of_prompts() -> None:
    assert completion().limit == 16
    assert completion(prompt=["a", "b"]).prompts == ["a", "b"]
    assert completion(prompt=[1, 2]).prompts == [[1, 2]]
    assert completion(prompt=[[1], [2]]).prompts == [[1], [2]]
    assert completion(stop="x").stops == ("x",)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 0}, {"n": 10**6}, {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 10**30}, {"max_tokens": 1.5},
        {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"stop": [""]}, {"stop": ["a"] * 5},
        {"prompt": []}, {"prompt": [[]]}, {"prompt": [-1]}, {"prompt": None}, {"logprobs": 6}, {"echo": True},
        {"suffix": "s"}, {"best_of": 2}, {"logit_bias": {"1": 5.0}}, {"stream_options": {}}, {"unknown": "secret"},
        {"prompt": "\ud800"}, {"seed": 2**64}, {"stream": "yes"},
    ],
)  # fmt: skip
def test_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**fields)
    assert caught.value.status == 400
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"null", b"[" * 100_000, b'{"model": "m"', b"1" * 10_000])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError):
        parse(ChatRequest, body)


def test_chat() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"model": "m", "messages": [{"role": "user", "content": parts}], "max_completion_tokens": 3}
    request = parse(ChatRequest, json.dumps(body).encode())
    assert request.messages[0].plain() == {"role": "user", "content": "ab"}
    assert request.limit == 3
    with pytest.raises(ApiError, match="logprobs"):
        parse(ChatRequest, json.dumps({**body, "top_logprobs": 2}).encode())
    with pytest.raises(ApiError):
        parse(ChatRequest, json.dumps({**body, "tools": [{"type": "function"}]}).encode())


MESSAGES = [{"role": "user", "content": "a"}]


def chat(**fields: Any) -> Any:
    return parse(ChatRequest, json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode())


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}}, {"n": 1}, {"logit_bias": {}}, {"frequency_penalty": 0},
        {"presence_penalty": 0}, {"tools": []}, {"tool_choice": "none"}, {"tool_choice": "auto"},
        {"parallel_tool_calls": True}, {"functions": []}, {"function_call": "none"}, {"user": "u"}, {"seed": 1},
        {"store": False}, {"metadata": {"run": "7"}}, {"modalities": ["text"]}, {"service_tier": "auto"},
        {"verbosity": "medium"}, {"safety_identifier": "x"}, {"prompt_cache_key": "x"}, {"stop": []},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    ],
)  # fmt: skip
def test_defaults_may_be_spelled_out(fields: dict[str, Any]) -> None:
    assert chat(**fields).messages[0].content == "a"


def test_every_field_of_the_official_client_may_be_null() -> None:
    from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming

    known = ChatRequest.model_fields
    assert CompletionCreateParamsNonStreaming.__annotations__.keys() <= known.keys()
    chat(**{name: None for name in known if name not in ("model", "messages")})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format: Input should be 'text'"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format: Extra inputs"),
        ({"modalities": ["text", "audio"]}, "modalities: "), ({"tool_choice": "required"}, "tool_choice: "),
        ({"functions": [{"name": "f"}]}, "functions: "), ({"store": True}, "store: "),
        ({"metadata": {"a": 1}}, "metadata: "),
        ({"reasoning_effort": "low"}, "reasoning_effort: "), ({"audio": {}}, "audio: "),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_in_a_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ApiError, match=said) as caught:
        chat(**fields)
    assert "\n" not in str(caught.value)


def test_messages_keep_their_names_and_may_be_answers_sent_back() -> None:
    from openai.types.chat import ChatCompletionMessage

    answer = ChatCompletionMessage(role="assistant", content="b").model_dump()
    named = {"role": "user", "content": "a", "name": "ann"}
    request = chat(messages=[named, answer, {**answer, "tool_calls": [], "annotations": []}])
    assert [message.plain() for message in request.messages] == [named, *[{"role": "assistant", "content": "b"}] * 2]
    with pytest.raises(ApiError, match="messages: "):
        chat(messages=[{**answer, "tool_calls": [{"id": "x"}]}])
