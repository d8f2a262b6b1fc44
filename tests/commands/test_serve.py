"""`qcompile serve`, as a user runs it."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest
from checkpoints import quantized, tokenizer

import qcompile
from qcompile import cli
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
    killer = threading.Timer(120, server.kill)
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
        (["--max-batch", "0"], "max-batch must be"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--timeout", "0"], "timeout must be"),
        (["--api-key-env", "QCOMPILE_NO_SUCH"], "is not set"),
    ],
)
def test_mistakes(folder: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(folder), *SMALL, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert reason in error
    assert len(error.splitlines()) == 1
