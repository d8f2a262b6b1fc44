"""Our CPU kernels stay within their operands. They run in a process of their own, which a stray access would kill."""

import multiprocessing
from collections.abc import Callable

import guarded_memory
import pytest
import torch

from qcompile.lowering import cpu_library
from qcompile.lowering.target import detect

HERE = detect(torch.device("cpu"))


@pytest.mark.parametrize(
    ("run", "kernel", "survives"),
    [
        (guarded_memory.products, cpu_library.SCALED_MM_VNNI, True),
        (guarded_memory.avx512, cpu_library.SCALED_MM_AVX512, True),
        (guarded_memory.avx2, cpu_library.SCALED_MM_AVX2, True),
        (guarded_memory.attention, cpu_library.ATTENTION, True),
        (guarded_memory.one_too_far, None, False),
    ],
    ids=["vnni", "avx512", "avx2", "attention", "one too far"],
)
def test_nothing_beyond_the_operands_is_touched(
    run: Callable[[], None], kernel: cpu_library.Kernel | None, survives: bool
) -> None:
    if kernel and (reason := kernel.runs_on(HERE)):
        pytest.skip(reason)
    process = multiprocessing.get_context("spawn").Process(target=run)
    process.start()
    process.join()
    assert (process.exitcode == 0) == survives
