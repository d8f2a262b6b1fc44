"""`qcompile serve DIR`: a server of the OpenAI protocol."""

import argparse
import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

from qcompile.commands.arguments import THREADS, add_shared, utf8, whole
from qcompile.errors import ConfigError
from qcompile.generation.pipeline import LENGTH, checked_length
from qcompile.paths import expanded

BACKLOG = 1024  # connections that the system holds until the server takes them


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser."""
    parser = commands.add_parser("serve", help="serve a quantized folder over the OpenAI protocol")
    parser.add_argument("model", metavar="DIR", help="quantized model folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=whole(0, 65535), default=8000)
    parser.add_argument(
        "--max-batch", type=whole(1, 1024), default=8, metavar="N", help="sequences at once (default 8)"
    )
    parser.add_argument(
        "--max-queue", type=whole(0, 100_000), default=64, metavar="N", help="sequences that may wait (default 64)"
    )
    parser.add_argument(
        "--max-length", type=whole(2), metavar="N",
        help=f"tokens of prompt and answer (default {LENGTH}, or the model's)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=whole(1, THREADS), metavar="N",
        help="of each step on CPU (default: torch's, but one core stays free)",
    )  # fmt: skip
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a request may take (default 600)")
    parser.add_argument("--model-name", type=utf8, help="what clients call the model (default: the folder's name)")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the key to ask for")
    add_shared(parser, "--inner", "--device", "--trust-remote-code")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Load, compile, serve until SIGINT or SIGTERM."""
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}; install it: pip install 'qcompile[serve]'") from None
    key = _key(arguments.api_key_env)
    if not arguments.timeout > 0:
        raise ConfigError(f"timeout must be a positive number of seconds; got {arguments.timeout}")
    import torch

    from qcompile.serving.http_app import build

    torch.set_num_threads(arguments.threads or default_threads())
    with socket.socket(socket.AF_INET6 if ":" in arguments.host else socket.AF_INET) as listener:
        with _free(arguments.host, arguments.port):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections keep nobody out
            listener.bind((arguments.host, arguments.port))
        service = load_service(arguments)
        app = build(service, key=key)
        config = uvicorn.Config(
            app, log_level="error", access_log=False, server_header=False, timeout_graceful_shutdown=None,
            backlog=BACKLOG,
        )  # fmt: skip
        with _free(arguments.host, arguments.port):  # two servers may have loaded at once
            listener.listen(BACKLOG)
        server = uvicorn.Server(config)
        _announce(server, f"serving {service.name} on http://{arguments.host}:{listener.getsockname()[1]}/v1")
        server.run(sockets=[listener])


@contextlib.contextmanager
def _free(host: str, port: int) -> Iterator[None]:
    """Raises ConfigError for an address that the system refuses to give to the block."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"host and port must be a free address of this machine; {host}:{port}: {reason}; choose others"
        ) from None


def default_threads() -> int:
    """The network's thread needs a core of its own. Where it has none, it stops a thread of the model in every parallel
    region of a step, and the others spin until it goes on: on two cores that made steps ten times as long."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(torch.get_num_threads(), max(1, cores - 1))


def load_service(arguments: argparse.Namespace) -> Any:
    """The model, compiled, in a running loop. Raises QCompileError."""
    from qcompile.checkpoint.loading import from_pretrained, load_tokenizer
    from qcompile.commands.device import device_of
    from qcompile.generation.slots import Slots
    from qcompile.model_limits import ends_of, positions_of, vocabulary_of
    from qcompile.serving.loop import ServingLoop
    from qcompile.serving.service import Service

    code = {"trust_remote_code": arguments.trust_remote_code}
    model = from_pretrained(arguments.model, device=device_of(arguments.device), **code)
    tokenizer = load_tokenizer(arguments.model, **code)
    length, ends = checked_length(arguments.max_length, positions_of(model)), ends_of(model, tokenizer)
    slots = Slots(model, arguments.max_batch, length, arguments.inner)
    loop = ServingLoop(slots, arguments.max_queue)
    with _bar() as told:
        loop.start(told)
    name = arguments.model_name or expanded(arguments.model).resolve().name
    vocabulary = vocabulary_of(model) or len(tokenizer)
    return Service(
        loop, tokenizer, name=name, length=length, vocabulary=vocabulary, ends=ends, timeout=arguments.timeout
    )


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"api-key-env must name an environment variable that holds a key; {variable} is not set")
    return key


def _announce(server: Any, line: str) -> None:
    """Say where it listens once it does."""
    started = server.startup

    async def startup(*args: Any, **kwargs: Any) -> None:
        await started(*args, **kwargs)
        if server.started:
            print(line, file=sys.stderr, flush=True)

    server.startup = startup


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("compiling", total=None)
        yield lambda done, total, what: progress.update(
            task, completed=done, total=total, description=f"compiling {what}" if done < total else what
        )
