"""The operators qcompile_cpu::…, and the kernels behind them for x86 with AVX512-VNNI (avx512/).

An operator's schema and fake are defined where it is used. The kernels are compiled once per machine, in seconds, with
Inductor's compiler and settings and into Inductor's cache, against torch's stable ABI.
"""

import functools
from pathlib import Path

import torch

from qcompile.lowering.target import Target

LIBRARY = torch.library.Library("qcompile_cpu", "DEF")  # type: ignore[no-untyped-call]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels write
SOURCES = tuple(Path(__file__).parent / "avx512" / name for name in ("common.h", "scaled_mm.cpp", "attention.cpp"))
OLDEST_TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11: what is newer is not declared
FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", OLDEST_TORCH)


def runs_on(target: Target) -> str:
    """Why these kernels cannot run on a target; empty if they can."""
    if target.kind != "cpu" or "avx512_vnni" not in target.features:
        return f"needs a CPU with AVX512-VNNI, the target is {target}"
    return not_built()


@functools.cache
def not_built() -> str:
    """Compile and load the library; why that failed, empty if it did not."""
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError

    class Extension(CppCodeCache):
        cache = {}  # noqa: RUF012 (CppCodeCache keeps one per class)
        cpp_compile_command_flags = {"include_pytorch": True, "shared": True}  # noqa: RUF012

    try:
        with torch.utils._python_dispatch._disable_current_modes():  # asked while a graph is traced, as a rule
            Extension.load("\n".join(source.read_text() for source in SOURCES), extra_flags=FLAGS)
    except (CppCompileError, RuntimeError, OSError) as error:
        return f"needs a C++ compiler: {str(error).strip().splitlines()[0]}"
    return ""
