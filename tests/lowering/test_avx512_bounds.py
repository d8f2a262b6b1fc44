"""Our CPU kernels stay within their operands. They run in a process of their own, which a stray access would kill."""

import multiprocessing
from collections.abc import Callable

import guarded_memory
import pytest
import torch

from qcompile.lowering import cpu_library
from qcompile.lowering.target import detect

HERE = detect(torch.device("cpu"))
pytestmark = pytest.mark.skipif(bool(cpu_library.runs_on(HERE)), reason=cpu_library.runs_on(HERE))


@pytest.mark.parametrize(
    ("run", "survives"),
    [(guarded_memory.products, True), (guarded_memory.attention, True), (guarded_memory.one_too_far, False)],
)
def test_nothing_beyond_the_operands_is_touched(run: Callable[[], None], survives: bool) -> None:
    process = multiprocessing.get_context("spawn").Process(target=run)
    process.start()
    process.join()
    assert (process.exitcode == 0) == survives
