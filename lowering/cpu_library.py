"""The operators qcompile_cpu::…, and the kernels behind them for x86 (x86/).

An operator's schema and fake are defined where it is used. Each kernel is compiled once per machine, in seconds, with
Inductor's compiler and settings and into Inductor's cache, against torch's stable ABI; and only where it is needed.
"""

import dataclasses
import functools
from pathlib import Path

import torch
from torch.fx import Graph

from qcompile.errors import LoweringError
from qcompile.lowering.target import Target

LIBRARY = torch.library.Library("qcompile_cpu", "DEF")  # type: ignore[no-untyped-call]
# Operands are contiguous where an operator is called; without the second, Inductor may lay them out otherwise.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_contiguous_strides)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels write
FOLDER = Path(__file__).parent / "x86"
OLDEST_TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11: what is newer is not declared
AVX2 = ("-mavx2", "-mf16c", OLDEST_TORCH)
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", OLDEST_TORCH)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled library. operator: of qcompile_cpu, which it has; feature: of a target, which it needs; called: how
    people know that."""

    operator: str
    feature: str
    called: str
    sources: tuple[str, ...]
    flags: tuple[str, ...]

    def runs_on(self, target: Target) -> str:
        """Why it cannot run on a target; empty if it can."""
        if target.kind != "cpu" or self.feature not in target.features:
            return f"needs a CPU with {self.called}, the target is {target}"
        return self.not_built()

    @functools.cache  # noqa: B019 (there are as many as below)
    def not_built(self) -> str:
        """Compile and load it; why that failed, empty if it did not."""
        from torch._inductor.codecache import CppCodeCache
        from torch._inductor.exc import CppCompileError

        class Extension(CppCodeCache):
            cache = {}  # noqa: RUF012 (CppCodeCache keeps one per class)
            cpp_compile_command_flags = {"include_pytorch": True, "shared": True}  # noqa: RUF012

        try:
            with torch.utils._python_dispatch._disable_current_modes():  # asked while a graph is traced, as a rule
                Extension.load("\n".join((FOLDER / name).read_text() for name in self.sources), extra_flags=self.flags)
        except (CppCompileError, RuntimeError, OSError) as error:
            return f"needs a C++ compiler: {str(error).strip().splitlines()[0]}"
        return ""


ATTENTION = Kernel("attention", "avx512", "AVX512", ("tensors.h", "avx512.h", "attention.cpp"), AVX512)
SCALED_MM_VNNI = Kernel(
    "scaled_mm", "avx512_vnni", "AVX512-VNNI", ("tensors.h", "avx512.h", "scaled_mm_vnni.cpp"),
    (*AVX512, "-mavx512vnni"),
)  # fmt: skip
AVX_SOURCES = ("tensors.h", "scaled_mm_avx.cpp")
SCALED_MM_AVX512 = Kernel("scaled_mm_avx512", "avx512", "AVX512", AVX_SOURCES, (*AVX512, "-DVECTOR_BITS=512"))
SCALED_MM_AVX2 = Kernel("scaled_mm_avx2", "avx2", "AVX2", AVX_SOURCES, (*AVX2, "-DVECTOR_BITS=256"))
KERNELS = (SCALED_MM_VNNI, SCALED_MM_AVX512, SCALED_MM_AVX2, ATTENTION)


def load_for(graph: Graph) -> None:
    """Load the kernels that a lowered graph calls, itself or by an operator's name among the arguments of another.
    Raises LoweringError if one cannot be built."""
    known = {kernel.operator: kernel for kernel in KERNELS}
    for node in graph.nodes:
        if node.op != "call_function" or not str(node.target).startswith("qcompile_cpu."):
            continue
        names = (str(node.target).split(".")[1], *(name for name in node.args if isinstance(name, str)))
        for kernel in (known[name] for name in names if name in known):
            if reason := kernel.not_built():
                raise LoweringError(f"qcompile_cpu::{kernel.operator} {reason}")
