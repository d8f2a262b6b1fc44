"""scaled_mm, int8 on x86 without VNNI: our own kernel, epilogue included (x86/scaled_mm_avx.cpp), for AVX512 and AVX2.

As that of scaled_mm_vnni, it reads weights where they lie and writes the finished result, for any number of tokens.
Activations stay signed. docs/cpu.md compares it with float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcompile.lowering.cpu_library import LIBRARY, SCALED_MM_AVX2, SCALED_MM_AVX512, TAGS, Kernel
from qcompile.lowering.cpu_product import scaled_mm_by, takes_int8
from qcompile.lowering.target import Target

LARGEST_K = (2**31 - 1) // 128**2  # weights that others quantized may hold −128


def takes(target: Target, x: Tensor, weight: Tensor) -> str:
    """Why the kernel cannot take these arguments; empty if it can."""
    return takes_int8(x, weight, LARGEST_K)


def _fake(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=others[-1])


@dataclasses.dataclass(frozen=True)
class Avx:
    """The kernel in vectors of one width."""

    kernel: Kernel

    @property
    def operator(self) -> str:
        """Its name in qcompile_cpu."""
        return self.kernel.operator

    def define(self) -> None:
        """Schema and fake; made once, below."""
        schema = "Tensor x, Tensor weight, Tensor? x_scale, Tensor? weight_scale, Tensor? bias, Tensor? residual"
        signature = f"{self.operator}({schema}, ScalarType out_dtype) -> Tensor"
        LIBRARY.define(signature, tags=TAGS)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"qcompile_cpu::{self.operator}", _fake, lib=LIBRARY)

    def runs_on(self, target: Target) -> str:
        """Why it cannot run on a target; empty if it can."""
        return self.kernel.runs_on(target)

    takes = staticmethod(takes)

    def accumulate(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [M, K] int8, weight [N, K] int8 → sums [M, N] int32."""
        return self._multiply(x.contiguous(), weight.contiguous(), None, None, None, None, torch.int32)

    @property
    def scaled_mm(self) -> Callable[..., Tensor]:
        """See qcompile.ops.scaled_mm."""
        return scaled_mm_by(self._multiply)

    def _multiply(self, *operands: Tensor | torch.dtype | None) -> Tensor:
        y: Tensor = getattr(torch.ops.qcompile_cpu, self.operator).default(*operands)
        return y


AVX512, AVX2 = Avx(SCALED_MM_AVX512), Avx(SCALED_MM_AVX2)
for form in (AVX512, AVX2):
    form.define()


def widest(target: Target) -> Avx | None:
    """The form of the kernel for a target, if there is one."""
    return next((form for form in (AVX512, AVX2) if not form.runs_on(target)), None)
