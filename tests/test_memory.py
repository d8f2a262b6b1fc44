"""Freed memory goes back to the system where the C library can do that."""

import contextlib
import ctypes
import gc
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from qcompile import memory

SOURCE = """
import resource, torch
from qcompile.memory import give_back
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
blocks = [torch.ones(2**18) for _ in range(100)]  # below the threshold for mapped memory once that has grown
keep = blocks[::10]
del blocks
before = resident()
give_back(collect=True)
print(before - resident())
"""


def has_trim() -> bool:
    return hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(not sys.platform.startswith("linux") or not has_trim(), reason="needs glibc")
def test_holes_between_live_blocks_are_given_back() -> None:
    environment = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", SOURCE], capture_output=True, text=True, check=True, env=environment, timeout=120
    )
    assert float(done.stdout) > 50


def test_elsewhere_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_trim", lambda: None)
    memory.give_back()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_inside_and_goes_on_as_before(enabled: bool) -> None:
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with contextlib.suppress(ZeroDivisionError), memory.uncollected():
            assert not gc.isenabled()
            _ = 1 / 0
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_the_memory_that_a_tensor_reaches() -> None:
    whole = torch.zeros(6, 4)
    device, start, end = memory.span_of(whole) or ("", 0, 0)
    assert (device, start, end - start) == ("cpu", whole.data_ptr(), 96)
    assert memory.span_of(whole[2:4]) == ("cpu", start + 32, start + 64)
    assert memory.span_of(whole[:, 1]) == ("cpu", start + 4, start + 4 + 5 * 16 + 4)
    assert memory.span_of(whole[0].expand(9, 4)) == ("cpu", start, start + 16)
    fake = FakeTensorMode().from_tensor(whole)
    for nothing in (3, whole[:0], torch.empty(2, device="meta"), torch.eye(2).to_sparse(), fake):
        assert memory.span_of(nothing) is None
