"""u8 × s8 with a shift of 128 is the s8 × s8 product, exactly."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile import ops
from qcompile.lowering import scaled_mm_int8_cpu as kernel
from qcompile.lowering import unsigned
from qcompile.lowering.target import Target, detect

SIZES = [1, 15, 17, 129]

runs_here = pytest.mark.skipif(
    bool(kernel.runs_on(detect(torch.device("cpu")))), reason="this processor saturates u8×s8 products"
)


def operands(rows: int, columns: int, channels: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(-127, 128, (rows, channels), dtype=torch.int8)
    return x, torch.randint(-128, 128, (columns, channels), dtype=torch.int8)


def accumulated(x: Tensor, weight: Tensor) -> Tensor:
    """What the kernel accumulates: with scales of 1, sums below 2^24 pass its float32 epilogue unrounded."""
    y = kernel.scaled_mm(x, weight, torch.ones(len(x)), torch.ones(len(weight)), None, None, None, torch.float64)
    return y.long()


@runs_here
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("channels", [2, 15, 17, 129])
def test_odd_shapes_are_exact(rows: int, columns: int, channels: int) -> None:
    x, weight = operands(rows, columns, channels)
    assert torch.equal(accumulated(x, weight), x.long() @ weight.long().T)


@runs_here
@pytest.mark.parametrize("channels", [2, 64, 4095, 4096])
@pytest.mark.parametrize(("left", "right"), [(127, 127), (-127, 127), (127, -128), (-127, -128), (0, -128)])
def test_extreme_values_do_not_saturate(channels: int, left: int, right: int) -> None:
    x = torch.full((3, channels), left, dtype=torch.int8)
    weight = torch.full((17, channels), right, dtype=torch.int8)
    shifted = unsigned.shifted(x)
    assert (torch.ops.qcompile_cpu.int_mm(shifted, weight) == channels * (left + unsigned.SHIFT) * right).all()
    ones = torch.ones(()), torch.ones(17)
    y = kernel.scaled_mm(x, weight, *ones, None, None, None, torch.float64)
    assert torch.equal(y, torch.full((3, 17), float(channels * left * right)).double())


EPILOGUES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "relu": {"activation": "relu"},
    "all": {"bias": True, "residual": True, "activation": "silu"},
    "float16": {"bias": True, "activation": "gelu", "out_dtype": torch.float16},
    "bfloat16": {"residual": True, "activation": "gelu_tanh", "out_dtype": torch.bfloat16},
}


@runs_here
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("leading", [(5,), (2, 3), (1,), (0,), ()], ids=str)
@pytest.mark.parametrize("per_token", [True, False])
def test_it_equals_the_definition(epilogue: str, leading: tuple[int, ...], per_token: bool) -> None:
    options = EPILOGUES[epilogue]
    x = torch.randint(-127, 128, (*leading, 33), dtype=torch.int8)
    weight = torch.randint(-128, 128, (17, 33), dtype=torch.int8)
    dtype = options.get("out_dtype", torch.float32)
    arguments = (
        x,
        weight,
        torch.rand(leading) * 1e-2 if per_token else torch.tensor(3e-3),
        torch.rand(17) * 1e-2,
        torch.randn(17).to(dtype) if options.get("bias") else None,
        torch.randn(*leading, 17).to(dtype) if options.get("residual") else None,
        options.get("activation"),
        dtype,
    )
    assert torch.equal(kernel.scaled_mm(*arguments), ops.scaled_mm(*arguments))


@runs_here
@pytest.mark.parametrize("strided", ["x", "weight", "both"])
def test_strided_operands(strided: str) -> None:
    x, weight = operands(6, 10, 32)
    if strided != "weight":
        x = torch.cat([x, x], 1)[:, :32]
    if strided != "x":
        weight = weight.T.contiguous().T
    assert torch.equal(accumulated(x, weight), x.long() @ weight.long().T)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (Target("cpu", 0, frozenset({"avx512_vnni"})), ""),
        (Target("cpu", 0, frozenset({"avx_vnni"})), ""),
        (Target("cpu", 0, frozenset({"amx_int8"})), ""),
        (Target("cpu"), "needs VNNI or AMX"),
        (Target("cuda", 90), "needs a CPU, the target is cuda (sm90)"),
    ],
    ids=str,
)
def test_where_it_runs(target: Target, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_multiplies_unsigned", lambda: True)
    assert kernel.runs_on(target).startswith(reason)
    assert bool(kernel.runs_on(target)) == bool(reason)


@runs_here
def test_the_operator_has_a_schema_and_a_fake() -> None:
    x, weight = operands(5, 7, 16)
    torch.library.opcheck(torch.ops.qcompile_cpu.int_mm.default, (unsigned.shifted(x), weight))
