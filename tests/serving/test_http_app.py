"""The server over real sockets: the official client, bad bodies, clients that leave, a full queue, the key."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_engine import VOCABULARY, CountingEngine, tokenizer

from qcompile.serving.http_app import build
from qcompile.serving.loop import ServingLoop
from qcompile.serving.service import Service

# `make fuzz-server` asks for thousands.
BODIES = int(os.environ.get("QCOMPILE_FUZZ_BODIES", "200"))
KEY = "open sesame"


class Running:
    """A server in a thread."""

    def __init__(self, key: str | None = None) -> None:
        self.engine = CountingEngine()
        loop = ServingLoop(self.engine, waiting=2)
        loop.start()
        self.service = Service(loop, tokenizer(), name="m", length=64, vocabulary=VOCABULARY, ends=frozenset([2]))
        config = uvicorn.Config(build(self.service, key=key), port=0, log_level="error", access_log=False)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0)

    def stop(self) -> None:
        self.engine.gate.set()
        self.client.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def idle(self) -> None:
        """Wait until nothing runs."""
        deadline = time.monotonic() + 20
        while self.service.loop.scheduler.busy:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def post(self, body: Any) -> Any:
        return httpx.post(f"{self.url}/v1/completions", json={"model": "m", "prompt": "a", **body}, timeout=30)


@pytest.fixture
def running() -> Iterator[Running]:
    with contextlib.closing(contextlib.ExitStack()) as stack:
        made = Running()
        stack.callback(made.stop)
        yield made


def test_the_official_client(running: Running) -> None:
    client = running.client
    assert [model.id for model in client.models.list()] == ["m"]
    assert client.models.retrieve("m").id == "m"
    whole = client.completions.create(model="m", prompt="a", max_tokens=4, temperature=0, logprobs=1)
    assert whole.choices[0].text == "bcde"
    stream = client.completions.create(
        model="m", prompt="a", max_tokens=4, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "bcde"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4
    messages: Any = [{"role": "user", "content": "x"}]
    chat = client.chat.completions.create(model="m", messages=messages, max_tokens=3, logprobs=True, n=2)
    assert [len(choice.message.content or "") for choice in chat.choices] == [3, 3]
    deltas = client.chat.completions.create(model="m", messages=messages, max_tokens=3, temperature=0, stream=True)
    assert len("".join(chunk.choices[0].delta.content or "" for chunk in deltas)) == 3
    with pytest.raises(openai.BadRequestError, match="at most 64 tokens"):
        client.completions.create(model="m", prompt="a", max_tokens=64)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="q", prompt="a")


def test_streams_end_in_done(running: Running) -> None:
    body = running.post({"max_tokens": 2, "stream": True}).text
    assert body.endswith("data: [DONE]\n\n")


def test_a_client_that_leaves_frees_its_slot(running: Running) -> None:
    for stream in (True, False):
        running.engine.gate.clear()
        with contextlib.suppress(httpx.TimeoutException), contextlib.closing(httpx.Client(timeout=0.5)) as client:
            body = {"model": "m", "prompt": "a", "max_tokens": 60, "stream": stream}
            with client.stream("POST", f"{running.url}/v1/completions", json=body) as answer:
                if stream:
                    next(answer.iter_lines())
        time.sleep(0.2)
        before = running.engine.steps
        running.engine.gate.set()
        running.idle()
        assert running.engine.steps - before < 50


def test_a_full_queue_is_429_with_retry_after(running: Running) -> None:
    running.engine.gate.clear()
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(running.post({}).status_code)) for _ in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while running.service.loop.scheduler.running + running.service.loop.scheduler.waiting < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    refused = running.post({})
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    running.engine.gate.set()
    for thread in threads:
        thread.join(30)
    assert statuses == [200] * 4


@pytest.mark.parametrize("fault", ["fail_prefill", "fail_decode"])
def test_a_failing_model_is_500_without_details(running: Running, fault: str) -> None:
    setattr(running.engine, fault, True)
    answer = running.post({})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    if fault == "fail_decode":
        assert '"error"' in running.post({"stream": True}).text
    setattr(running.engine, fault, False)
    assert running.post({}).status_code == 200


def test_shutdown_finishes_what_runs(running: Running) -> None:
    running.engine.gate.clear()
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(running.post({"max_tokens": 30, "temperature": 0})))
    thread.start()
    while not running.service.loop.scheduler.running:
        time.sleep(0.01)
    running.server.should_exit = True
    time.sleep(0.3)
    running.engine.gate.set()
    thread.join(30)
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 30


def test_the_key(capfd: pytest.CaptureFixture[str]) -> None:
    running = Running(KEY)
    try:
        assert running.client.models.list().data[0].id == "m"
        for headers in ({}, {"Authorization": "Bearer open"}, {"Authorization": KEY}, {"Authorization": b"\xff"}):
            refused = httpx.get(f"{running.url}/v1/models", headers=headers)  # type: ignore[arg-type]
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{running.url}/metrics").status_code == 401
        assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
    finally:
        running.stop()
    assert capfd.readouterr() == ("", "")


def test_metrics_other_paths_and_large_bodies(running: Running) -> None:
    assert "qcompile_running 0" in httpx.get(f"{running.url}/metrics").text
    assert httpx.get(f"{running.url}/nowhere").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{running.url}/v1/completions").status_code == 405
    large = httpx.post(f"{running.url}/v1/completions", content=b" " * (2**20 + 64 * 64 + 1))
    assert large.status_code == 413


FIELDS = (
    "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "logprobs",
    "top_logprobs", "stream_options", "echo", "tools", "user", "logit_bias", "best_of", "suffix", "what",
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("m")
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
OBJECTS = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6)
NEARLY = OBJECTS.map(
    lambda fields: {"model": "m", "prompt": "a", "messages": [{"role": "user", "content": "a"}], **fields}
)


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_bad_bodies_are_4xx_of_one_shape(running: Running) -> None:
    with httpx.Client(timeout=30) as client:

        @settings(max_examples=BODIES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(
            path=st.sampled_from(["completions", "chat/completions"]),
            body=st.binary(max_size=40) | VALUES.map(encoded) | NEARLY.map(encoded),
        )
        def fuzz(path: str, body: bytes) -> None:
            answer = client.post(f"{running.url}/v1/{path}", content=body)
            if answer.status_code != 200:
                assert 400 <= answer.status_code < 500, body
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

        fuzz()
    running.idle()
    assert not running.service.loop.errors
