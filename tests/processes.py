"""Run functions in several processes that form one gloo group, as torchrun would start them."""

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable, Sequence
from typing import Any

PATIENCE = 240.0


def together(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(*args) in `size` processes; what each returned, or the text of what it raised, in the order of ranks.

    The function has to be importable: processes are spawned, from a server that has imported what takes long.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "qcompile", "checkpoints"])
    receivers, running = [], []
    port = free_port()
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(rank, size, port, sender, function, args), daemon=True)
        process.start()
        sender.close()
        receivers.append(receiver)
        running.append(process)
    try:
        return [_received(receiver) for receiver in receivers]
    finally:
        for process in running:
            process.join(10)
            if process.is_alive():
                process.kill()


def _received(receiver: Any) -> Any:
    assert receiver.poll(PATIENCE), "a process neither answered nor ended"
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        return "ended without a word"


def _child(rank: int, size: int, port: int, sender: Any, function: Callable[..., Any], args: Sequence[Any]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment(rank, size, port))
    try:
        answer = function(*args)
    except BaseException as error:
        answer = f"{type(error).__name__}: {error}"
    sender.send_bytes(pickle.dumps(answer))  # torch's own pickler would share memory, which ends with this process
    sender.close()


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells each process."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
