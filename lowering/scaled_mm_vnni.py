"""scaled_mm, int8 on x86 with AVX512-VNNI: our own kernel, epilogue included (scaled_mm_vnni.cpp).

It reads weights where they lie and writes the finished result, for any number of tokens. It is compiled once per
machine, in seconds, by Inductor's own compiler settings and into Inductor's cache, against torch's stable ABI.
docs/cpu.md compares it with oneDNN.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

from qcompile import ops
from qcompile.lowering import unsigned
from qcompile.lowering.target import Target

SOURCE = Path(__file__).with_suffix(".cpp")
OLDEST_TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11: what is newer is not declared
FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", OLDEST_TORCH)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# More tokens than this are oneDNN's where there is AMX, which multiplies several times faster and which this kernel
# does not use. Up to here weights arrive from memory no faster.
FEW = 16

unsigned.LIBRARY.define(  # type: ignore[no-untyped-call]
    "scaled_mm(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor compensation, Tensor? bias,"
    " Tensor? residual, ScalarType out_dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake(
    "qcompile_cpu::scaled_mm",
    lambda x, weight, x_scale, weight_scale, compensation, bias, residual, out_dtype: x.new_empty(
        (x.shape[0], weight.shape[0]), dtype=out_dtype
    ),
    lib=unsigned.LIBRARY,
)


def runs_on(target: Target) -> str:
    """Why this kernel cannot run on a target; empty if it can."""
    if target.kind != "cpu" or "avx512_vnni" not in target.features:
        return f"needs a CPU with AVX512-VNNI, the target is {target}"
    return _not_built()


@functools.cache
def _not_built() -> str:
    """Compile and load the kernel; why that failed, empty if it did not."""
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError

    class Extension(CppCodeCache):
        cache = {}  # noqa: RUF012 (CppCodeCache keeps one per class)
        cpp_compile_command_flags = {"include_pytorch": True, "shared": True}  # noqa: RUF012

    try:
        with torch.utils._python_dispatch._disable_current_modes():  # asked while a graph is traced, as a rule
            Extension.load(SOURCE.read_text(), extra_flags=FLAGS)
    except (CppCompileError, RuntimeError, OSError) as error:
        return f"needs a C++ compiler: {str(error).strip().splitlines()[0]}"
    return ""


def takes(target: Target, x: Tensor, weight: Tensor) -> str:
    """Why this kernel cannot take these arguments; empty if it can."""
    if reason := unsigned.takes(target, x, weight):
        return reason
    tokens = x.numel() // max(1, weight.shape[1])
    if "amx_int8" in target.features and not (isinstance(tokens, int) and tokens <= FEW):
        return f"is for at most {FEW} tokens where there is AMX"
    return ""


def scaled_mm(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """x [..., K], weight [N, K] → [..., N]; see qcompile.ops.scaled_mm.

    The kernel adds bias and residual. An activation, and dtypes that it does not write, are left to Inductor.
    """
    rows = unsigned.shifted(x.reshape(-1, x.shape[-1])).contiguous()
    shape = (*x.shape[:-1], weight.shape[0])
    whole = activation is None and out_dtype in DTYPES and (residual is None or residual.dtype == out_dtype)
    y: Tensor = torch.ops.qcompile_cpu.scaled_mm.default(
        rows,
        weight.contiguous(),
        x_scale.reshape(-1).contiguous(),
        weight_scale.contiguous(),
        unsigned.compensation(weight),
        None if bias is None else bias.to(torch.float32),
        residual.reshape(-1, weight.shape[0]).contiguous() if whole and residual is not None else None,
        out_dtype if whole else torch.float32,
    )
    y = y if whole else ops.finish(y, residual, activation, out_dtype)
    return y.reshape(shape)
