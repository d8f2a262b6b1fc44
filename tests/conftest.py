"""Every test starts from the same random numbers and from a compiler that has seen nothing."""

import gc
import os
import sys
from collections.abc import Iterator

import pytest
import torch

# Tests break passes on purpose, and look at what passes did: no graph of an earlier run may stand in for one of theirs.
os.environ.setdefault("QCOMPILE_CACHE", "0")
# What an operator's fake says of sizes and strides is compared with what it returns.
os.environ.setdefault("TORCHINDUCTOR_SIZE_ASSERTS", "1")
# Every process that compiles would first start three more, to see whether what the compiler builds for this CPU loads.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


@pytest.fixture(autouse=True, scope="module")
def settled_heap() -> None:
    """What earlier modules have left is not looked at again: a million objects, a third of the tests' time. Tracing
    makes many objects and keeps most, so that looking at them often finds little."""
    gc.set_threshold(20_000, 10, 10)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
