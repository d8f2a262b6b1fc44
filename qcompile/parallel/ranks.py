"""The processes of a run that torchrun started: joined while something is done together, and ended together.

Collectives wait for every process. One that fails counts itself in the shared store before it leaves; its connections
close, which ends the others' waiting, and they find that another was first. So the first alone says what happened.
"""

import contextlib
import dataclasses
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from qcompile.errors import ConfigError, OtherRankError, RankError

Store = Any  # torch.distributed has the class, but exports no type
FAILED = "qcompile/failed"
# How long the processes wait for each other at the start, and for the slowest to compile.
PATIENCE = timedelta(minutes=30)
# How many seconds one that failed waits for the others to notice.
FAREWELL = 3.0


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among `size`: its number, its number on its machine, and the name of the process group."""

    rank: int = 0
    size: int = 1
    local: int = 0
    group: str = ""

    @property
    def first(self) -> bool:
        """Whether this is the one that talks."""
        return self.rank == 0

    def same(self, make: Callable[[], str]) -> str:
        """What the first process makes, on every one of them."""
        made: list[Any] = [make() if self.first else None]
        if self.size > 1:
            dist.broadcast_object_list(made, src=0)
        return str(made[0])

    def device(self, kind: str) -> str:
        """Each process has a GPU of its own. Raises ConfigError."""
        if kind != "cuda" or self.size == 1:
            return kind
        if self.local >= torch.cuda.device_count():
            raise ConfigError(
                f"every process needs a GPU of its own; there are {torch.cuda.device_count()}; start as many processes"
            )
        torch.cuda.set_device(self.local)
        return f"cuda:{self.local}"


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The processes of this run, one if no launcher set RANK and WORLD_SIZE. Only the first one's warnings are shown.

    An exception in one ends it in all: that one raises it, the others OtherRankError. Raises RankError if the processes
    cannot find each other, or lose one that does not say why.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    store, rank = _meet(size)
    try:
        with warnings.catch_warnings():
            if rank:
                warnings.simplefilter("ignore")
            assert dist.group.WORLD is not None
            yield Ranks(rank, size, int(os.environ.get("LOCAL_RANK", rank)), dist.group.WORLD.group_name)
        dist.all_reduce(torch.zeros(1))  # nobody leaves before everybody is done
    except Exception as error:
        earlier = _count_failure(store)
        dist.destroy_process_group()  # closes connections, which wakes those that wait for this process
        if rank == 0:
            _await_others(store, size)  # the store may be this process's
        raise _said(error, earlier) from None
    dist.destroy_process_group()


def _meet(size: int) -> tuple[Store, int]:
    try:
        store, rank, _ = next(rendezvous("env://", timeout=PATIENCE))
        dist.init_process_group(store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise RankError(f"processes must be started by torchrun, and reach each other; {reason}") from None
    return store, rank


def _count_failure(store: Store) -> int:
    """How many processes had failed before this one did; none if the store is gone, with the process that held it."""
    try:
        return int(store.add(FAILED, 1)) - 1
    except RuntimeError:
        return 0


def _await_others(store: Store, size: int) -> None:
    """Until every process has failed, or something keeps it from it."""
    end = time.monotonic() + FAREWELL
    while time.monotonic() < end and store.add(FAILED, 0) < size:
        time.sleep(0.01)


def _said(error: Exception, earlier: int) -> Exception:
    if earlier:
        return OtherRankError("another process failed")
    reason = str(error).partition("\n")[0]
    if isinstance(error, RuntimeError) and re.search(r"gloo|NCCL|Connection (closed|reset)", reason):
        return RankError(f"the processes must stay connected; one of them ended: {reason[:200]}")
    return error
