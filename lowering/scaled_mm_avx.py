"""scaled_mm, int8 on x86 without VNNI: our own kernel, epilogue included (x86/scaled_mm_avx.cpp), for AVX512 and AVX2.

As that of scaled_mm_vnni, it reads weights where they lie and writes the finished result, for any number of tokens.
Activations stay signed. docs/cpu.md compares it with float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcompile import products
from qcompile.lowering.cpu_library import DTYPES, LIBRARY, SCALED_MM_AVX2, SCALED_MM_AVX512, TAGS, Kernel
from qcompile.lowering.target import Target

LARGEST_K = (2**31 - 1) // 128**2  # weights that others quantized may hold −128


def takes(target: Target, x: Tensor, weight: Tensor) -> str:
    """Why the kernel cannot take these arguments; empty if it can."""
    if x.dtype != torch.int8:
        return f"needs int8, got {x.dtype}"
    if weight.shape[1] > LARGEST_K:
        return f"needs K ≤ {LARGEST_K} to stay within int32, got {weight.shape[1]}"
    return ""


def _fake(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=others[-1])


@dataclasses.dataclass(frozen=True)
class Avx:
    """The kernel in vectors of one width."""

    kernel: Kernel
    takes: Callable[[Target, Tensor, Tensor], str] = takes

    @property
    def operator(self) -> str:
        """Its name in qcompile_cpu."""
        return self.kernel.operator

    def define(self) -> None:
        """Schema and fake; made once, below."""
        schema = "Tensor x, Tensor weight, Tensor? x_scale, Tensor? weight_scale, Tensor? bias, Tensor? residual"
        LIBRARY.define(  # type: ignore[no-untyped-call]
            f"{self.operator}({schema}, ScalarType out_dtype) -> Tensor", tags=TAGS
        )
        torch.library.register_fake(f"qcompile_cpu::{self.operator}", _fake, lib=LIBRARY)

    def runs_on(self, target: Target) -> str:
        """Why it cannot run on a target; empty if it can."""
        return self.kernel.runs_on(target)

    def accumulate(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [M, K] int8, weight [N, K] int8 → sums [M, N] int32."""
        operands = x.contiguous(), weight.contiguous()
        return self._call(*operands, None, None, None, None, torch.int32)

    def scaled_mm(
        self,
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
        whole = activation is None and out_dtype in DTYPES and (residual is None or residual.dtype == out_dtype)
        y = self._call(
            x.reshape(-1, x.shape[-1]).contiguous(),
            weight.contiguous(),
            x_scale.reshape(-1).contiguous(),
            weight_scale.contiguous(),
            None if bias is None else bias.to(torch.float32).contiguous(),
            residual.reshape(-1, weight.shape[0]).contiguous() if whole and residual is not None else None,
            out_dtype if whole else torch.float32,
        )
        y = y if whole else products.finish(y, residual, activation, out_dtype)
        return y.reshape(*x.shape[:-1], weight.shape[0])

    def _call(self, *operands: Tensor | torch.dtype | None) -> Tensor:
        y: Tensor = getattr(torch.ops.qcompile_cpu, self.operator).default(*operands)
        return y


AVX512, AVX2 = Avx(SCALED_MM_AVX512), Avx(SCALED_MM_AVX2)
for form in (AVX512, AVX2):
    form.define()


def widest(target: Target) -> Avx | None:
    """The form of the kernel for a target, if there is one."""
    return next((form for form in (AVX512, AVX2) if not form.runs_on(target)), None)
