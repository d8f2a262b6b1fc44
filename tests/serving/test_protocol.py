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
