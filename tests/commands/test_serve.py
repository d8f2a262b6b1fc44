"""`qcompile serve`, as a user runs it."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest
from checkpoints import quantized, tokenizer

import qcompile
from qcompile import cli
from qcompile.commands import serve
from qcompile.commands.serve import default_threads

SMALL = ["--max-batch", "2", "--max-length", "16", "--inner", "eager", "--port", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "tiny"
    qcompile.save_pretrained(quantized(), path, tokenizer=tokenizer())
    return path


def test_serves_on_loopback_until_told_to_stop(folder: Path) -> None:
    command = [sys.executable, "-P", "-m", "qcompile", "serve", str(folder), *SMALL]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    killer = threading.Timer(300, server.kill)  # a machine may be busy
    killer.start()
    try:
        assert server.stderr is not None
        found = next(filter(None, (re.search(r"serving tiny on (http\S+)", line) for line in server.stderr)), None)
        assert found is not None
        assert found[1].startswith("http://127.0.0.1:")
        with openai.OpenAI(base_url=found[1], api_key="none", max_retries=0) as client:
            greedy = [client.completions.create(model="tiny", prompt="the ", max_tokens=5, temperature=0) for _ in "ab"]
        assert greedy[0].choices == greedy[1].choices
        server.send_signal(signal.SIGTERM)
        left = server.stderr.read()
        assert server.wait(60) in (0, -signal.SIGTERM)
        assert "Traceback" not in left
        assert str(folder) not in left
    finally:
        killer.cancel()
        server.kill()
        server.wait()
        server.stderr.close()  # type: ignore[union-attr]


@pytest.mark.parametrize(("torchs", "cores", "expected"), [(2, 2, 1), (1, 1, 1), (8, 16, 8), (16, 16, 15), (2, 16, 2)])
def test_a_core_stays_free(torchs: int, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: torchs)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    assert default_threads() == expected


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--max-length", "999"], "max-length must be 2…128"),
        (["--max-batch", "0"], "argument --max-batch: must be a whole number, in 1…1024; got '0'"),
        (["--threads", "0"], "argument --threads: must be a whole number, in 1…4096; got '0'"),
        (["--timeout", "0"], "timeout must be"),
        (["--api-key-env", "QCOMPILE_NO_SUCH"], "is not set"),
        (["--host", "192.0.2.1"], "must be a free address of this machine; 192.0.2.1:0: "),
        (["--host", "a..b"], "must be a free address of this machine; a..b:0: "),
    ],
)
def test_mistakes(folder: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(folder), *SMALL, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert reason in error
    assert len(error.splitlines()) == 1


def test_a_taken_address_is_known_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["serve", str(tmp_path / "nowhere"), *SMALL, "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"qcompile: host and port must be a free address of this machine; 127.0.0.1:{port}: Address already in use; "
        "choose others\n"
    )


def test_an_address_that_another_server_took_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    others: list[socket.socket] = []
    monkeypatch.setattr(
        serve, "load_service", lambda arguments: others.append(socket.create_server(("127.0.0.1", port)))
    )
    monkeypatch.setattr("qcompile.serving.http_app.build", lambda service, key: None)
    try:
        assert cli.main(["serve", str(folder), *SMALL, "--port", str(port)]) == 2
    finally:
        others[0].close()
    assert capsys.readouterr().err.endswith(f":{port}: Address already in use; choose others\n")
