"""Which fp8 products cuBLAS gets, and what Inductor makes of them for a GPU that is not here. Numbers: tests/gpu."""

import dataclasses

import pytest
import torch
from graphs import captured, count

import qcompile.passes as passes
from qcompile.bench import gpu_timing
from qcompile.config import Config
from qcompile.lowering import scaled_mm_cublas
from qcompile.lowering.expand_kernels import expand_kernels
from qcompile.lowering.inductor import decompositions
from qcompile.lowering.lower import lower
from qcompile.lowering.partition import partition
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import Row, Table, Tile

pytest.importorskip("triton")

from absent_gpu import inductor_source, on_cuda, pretended

FP8, E5M2, HALF = torch.float8_e4m3fn, torch.float8_e5m2, torch.float16
SM90 = Target("cuda", 90)
TABLE = Table("absent", "this test", (Row("fp8", None, None, None, Tile(64, 64, 64, cublas=True)),))
pretending = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU; tests/gpu uses it")


def taken(
    x_dtype: torch.dtype = FP8, weight_dtype: torch.dtype = FP8, n: int = 48, k: int = 32, scale: int = 1,
    residual: bool = False, activation: str = "", out_dtype: torch.dtype = torch.bfloat16,
    bias: torch.dtype | None = None, transposed: bool = False,
) -> str:  # fmt: skip
    x, weight = torch.empty(4, k, dtype=x_dtype), torch.empty(n, k, dtype=weight_dtype)
    return scaled_mm_cublas.takes(
        torch.empty(k, 4, dtype=x_dtype).t() if transposed else x,
        weight,
        torch.empty(4) if scale else torch.empty(()),
        torch.empty(n, dtype=bias) if bias else None,
        torch.empty(4, n) if residual else None,
        activation,
        out_dtype,
    )


def test_what_it_takes() -> None:
    assert taken() == taken(bias=torch.bfloat16) == ""
    for refused, reason in (
        (taken(x_dtype=E5M2), "needs e4m3 operands and bfloat16 results, got torch.float8_e5m2"),
        (taken(torch.int8, torch.int8), "needs e4m3"), (taken(out_dtype=HALF), "needs e4m3"),
        (taken(residual=True), "has no activation"), (taken(activation="relu"), "has no activation"),
        (taken(scale=0), "needs a scale per token"), (taken(bias=HALF), "needs a bias of bfloat16, got torch.float16"),
        (taken(n=40), "needs N and K to be multiples of 16, got (40, 32)"), (taken(k=24), "needs N and K"),
        (taken(n=0), "needs N and K"), (taken(transposed=True), "needs rows one behind the other"),
    ):  # fmt: skip
        assert refused.startswith(reason)


def test_operands_must_lie_as_cublas_is_told() -> None:
    row, weight = torch.empty(32, dtype=FP8), torch.empty(48 * 32 + 16, dtype=FP8)
    rest = torch.empty(1), None, None, "", torch.bfloat16
    assert not scaled_mm_cublas.takes(row.reshape(1, 32), weight[: 48 * 32].reshape(48, 32), *rest)
    assert not scaled_mm_cublas.takes(row.reshape(1, 32), weight[16:].reshape(48, 32), *rest)
    odd = row.as_strided((1, 32), (1, 1))
    assert "strides (1, 1)" in scaled_mm_cublas.takes(odd, weight[16:].reshape(48, 32), *rest)
    assert scaled_mm_cublas.takes(row.reshape(1, 32), weight[8:-8].reshape(48, 32), *rest)


class Two(torch.nn.Module):
    """A product that cuBLAS can take, and one with a residual, which it cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = torch.nn.RMSNorm(64), torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)))


@pretending
@pytest.mark.inductor
def test_it_is_an_operator_of_its_own_and_the_rest_stays_ours() -> None:
    capture = captured(Two().bfloat16(), torch.randn(256, 64, dtype=torch.bfloat16))
    quantized, _ = passes.quantizing(Config(dtype="fp8")).run(capture.graph)
    run = partition(lower(quantized, SM90, decompositions(), TABLE)[0]).run
    with pretended(SM90):
        opened = expand_kernels(on_cuda(run), decompositions())
    (theirs,) = opened.graph.find_nodes(op="call_function", target=torch.ops.qcompile_cublas.scaled_mm.default)
    assert theirs.meta["val"].shape == (256, 128), "up; down adds its residual in our kernel"
    assert not count(opened, torch.ops.qcompile_triton.scaled_mm.default)
    source = inductor_source(run, SM90)
    assert source.count("torch.ops.qcompile_cublas.scaled_mm.default(") == 1
    assert source.count("scaled_mm_kernel_0.run(") == 1


def test_what_is_timed_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(scaled_mm_cublas, "scaled_mm_op", lambda *operands: called.append("cublas"))
    x, weight = torch.empty(4, 32, dtype=FP8), torch.empty(48, 32, dtype=FP8)
    tile = Tile(64, 64, 64, cublas=True)
    gpu_timing.product(tile)((x, weight, torch.empty(4), torch.empty(48)))
    assert called == ["cublas"]
    assert gpu_timing.compiled_form(tile) == gpu_timing.compiled_form(dataclasses.replace(tile, cublas=False))
