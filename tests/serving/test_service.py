"""From requests to sequences, without HTTP."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from serving_engine import VOCABULARY, CountingEngine, tokenizer

from qcompile.serving.loop import ServingLoop
from qcompile.serving.protocol import ApiError, ChatRequest, CompletionRequest
from qcompile.serving.service import Service, poster


@pytest.fixture
def service() -> Iterator[Service]:
    loop = ServingLoop(CountingEngine(), waiting=2)
    loop.start()
    yield Service(loop, tokenizer(), name="m", length=16, vocabulary=VOCABULARY, ends=frozenset([2]))
    loop.close()


def whole(service: Service, request: Any) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        service.loop.post = poster(asyncio.get_running_loop())
        return await (await service.start(request)).whole()

    return asyncio.run(run())


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest(**{"model": "m", "prompt": "a", "temperature": 0.0, "max_tokens": 4, **fields})


def test_prompts_times_n_in_order(service: Service) -> None:
    found = whole(service, completion(prompt=["a", "f"], n=2))
    assert [choice["text"] for choice in found["choices"]] == ["bcde", "bcde", "ghij", "ghij"]
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 16, "total_tokens": 18}


def test_chat_goes_through_the_template(service: Service) -> None:
    request = ChatRequest(model="m", messages=[{"role": "user", "content": "a"}], temperature=0.0, max_tokens=2)
    assert whole(service, request)["choices"][0]["message"]["role"] == "assistant"


def test_the_template_sees_names(service: Service) -> None:
    service._reader.chat_template = "{% for message in messages %}{{ message.name }}{% endfor %}"
    messages = [{"role": "user", "content": "x", "name": "a"}]
    request = ChatRequest(model="m", messages=messages, temperature=0.0, max_tokens=2)
    assert whole(service, request)["choices"][0]["message"]["content"] == "bc"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"model": "other"}, 404), ({"prompt": ""}, 400), ({"prompt": [VOCABULARY]}, 400), ({"max_tokens": 16}, 400),
        ({"prompt": "a" * 17}, 400), ({"n": 5}, 400),
    ],
)  # fmt: skip
def test_limits_are_checked_before_work_starts(service: Service, fields: dict[str, Any], status: int) -> None:
    with pytest.raises(ApiError) as caught:
        whole(service, completion(**fields))
    assert caught.value.status == status
    assert service.loop.steps == 0
