"""The library of our own CPU kernels: where it is built, and what is said where it cannot be."""

import pytest
import torch

from qcompile.lowering import cpu_library
from qcompile.lowering.target import Target, detect


@pytest.mark.parametrize("target", [
    Target("cpu"), Target("cpu", 0, frozenset({"avx_vnni"})), Target("cpu", 0, frozenset({"amx_int8"})),
    Target("cuda", 90),
], ids=str)  # fmt: skip
def test_other_processors_are_turned_away_without_building(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "not_built", lambda: pytest.fail("compiled for nothing"))
    assert cpu_library.runs_on(target).startswith("needs a CPU with AVX512-VNNI")


def test_without_a_compiler_it_says_so() -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        reason = cpu_library.not_built.__wrapped__()
    assert reason.startswith("needs a C++ compiler: ")
    assert "\n" not in reason


def test_every_source_is_there_and_in_the_package() -> None:
    folder = cpu_library.SOURCES[0].parent
    assert {source.name for source in cpu_library.SOURCES} == {path.name for path in folder.iterdir()}


def test_it_is_built_once_per_process() -> None:
    if cpu_library.runs_on(detect(torch.device("cpu"))):
        pytest.skip("no AVX512-VNNI here")
    before = cpu_library.not_built.cache_info().misses
    cpu_library.runs_on(detect(torch.device("cpu")))
    assert cpu_library.not_built.cache_info().misses == before == 1
