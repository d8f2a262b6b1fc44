"""The libraries of our own CPU kernels: where they are built, and what is said where they cannot be."""

import pytest
import torch

from qcompile.errors import LoweringError
from qcompile.lowering import attention_cpu, cpu_library, scaled_grouped_mm_cpu  # noqa: F401 (operators)
from qcompile.lowering.cpu_library import KERNELS, Kernel
from qcompile.lowering.target import CPU_FEATURES, Target, detect

HERE = detect(torch.device("cpu"))


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.operator)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    found: Kernel = request.param
    return found


def test_other_processors_are_turned_away_without_building(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernel, "not_built", lambda self: pytest.fail("compiled for nothing"))
    others = frozenset(CPU_FEATURES) - {kernel.feature}
    for target in (Target("cpu"), Target("cpu", 0, others), Target("cuda", 90, frozenset(CPU_FEATURES))):
        assert kernel.runs_on(target) == f"needs a CPU with {kernel.called}, the target is {target}"


def test_without_a_compiler_it_says_so(kernel: Kernel) -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        reason = Kernel.not_built.__wrapped__(kernel)
    assert reason.startswith("needs a C++ compiler: ")
    assert "\n" not in reason


@pytest.mark.parametrize("by_name", [False, True])
def test_a_graph_loads_what_it_calls(kernel: Kernel, by_name: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    calls = {True: "scaled_grouped_mm", False: kernel.operator}
    operator = getattr(torch.ops.qcompile_cpu, calls[by_name]).default
    graph.call_function(operator, (x, kernel.operator) if by_name else (x,))
    graph.call_function(torch.ops.aten.neg.default, (x,))
    loaded: list[Kernel] = []
    monkeypatch.setattr(Kernel, "not_built", lambda self: loaded.append(self) or "")
    cpu_library.load_for(graph)
    assert loaded == [kernel]
    monkeypatch.setattr(Kernel, "not_built", lambda self: "needs a C++ compiler: none")
    with pytest.raises(LoweringError, match=f"qcompile_cpu::{kernel.operator} needs a C"):
        cpu_library.load_for(graph)


def test_every_source_is_there_and_in_the_package() -> None:
    assert {source for kernel in KERNELS for source in kernel.sources} == {
        path.name for path in cpu_library.FOLDER.iterdir()
    }


def test_it_is_built_once_per_process(kernel: Kernel) -> None:
    if reason := kernel.runs_on(HERE):
        pytest.skip(reason)
    before = Kernel.not_built.cache_info().misses
    kernel.runs_on(HERE)
    assert Kernel.not_built.cache_info().misses == before
