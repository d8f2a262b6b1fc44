"""Timing on a GPU: the arithmetic around the clock. The clock itself runs in tests/gpu."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompile import ops
from qcompile.bench import gpu_timing
from qcompile.bench.gpu_timing import compiled_form, copies, microseconds
from qcompile.lowering.tiles import Tile


@pytest.mark.parametrize(
    ("size", "cache", "expected"),
    [(1, 60, 8), (16, 60, 8), (30, 60, 4), (60, 60, 2), (119, 60, 2), (120, 60, 1), (1000, 60, 1), (0, 60, 8)],
)
def test_operands_overflow_the_cache_twice(size: int, cache: int, expected: int) -> None:
    assert copies(size, cache) == expected


@pytest.mark.parametrize("each", [2.0, 40.0, 5000.0])
@pytest.mark.parametrize("count", [1, 4])
def test_a_calls_share_of_a_replay(each: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay takes the time of its calls: whatever is captured, one call's time comes out."""

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: object) -> None:
            pass

    replays: list[tuple[float, int]] = []
    monkeypatch.setattr(gpu_timing.torch.cuda, "Stream", Stream)
    monkeypatch.setattr(gpu_timing.torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(gpu_timing.torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(gpu_timing, "_captured", lambda calls, repeat, pool=None: each * len(calls) * repeat)

    def timed(graph: float, rounds: int) -> float:
        replays.append((graph, rounds))
        return graph

    monkeypatch.setattr(gpu_timing, "_replays", timed)
    called: list[int] = []
    found = microseconds([lambda i=i: called.append(i) for i in range(count)])  # type: ignore[misc]
    assert found == pytest.approx(each)
    assert sorted(set(called)) == list(range(count))
    graph, rounds = replays[-1]
    assert graph >= gpu_timing.SHORTEST_REPLAY * 0.7
    assert gpu_timing.FEWEST <= rounds <= gpu_timing.MOST


@pytest.mark.parametrize(("once", "count", "repeat"), [(5.0, 1, 40), (5.0, 4, 10), (3000.0, 2, 1)])
def test_a_clock_replays_long_enough(once: float, count: int, repeat: int, monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[tuple[int, object]] = []

    def capture(calls: list[object], repeat: int, pool: object) -> float:
        captured.append((repeat, pool))
        return once * len(calls) * repeat

    monkeypatch.setattr(gpu_timing, "_captured", capture)
    monkeypatch.setattr(gpu_timing, "_replays", lambda graph, rounds: graph * rounds)
    clock = gpu_timing.clock_of([lambda: None] * count, once, "pool")
    assert captured == [(repeat, "pool")]
    assert [clock(), clock()] == pytest.approx([once, once])
    assert captured == [(repeat, "pool")], "captured once"


def test_a_wrong_result_is_seen() -> None:
    x, weight = torch.randint(-9, 9, (5, 8)).to(torch.int8), torch.randint(-9, 9, (7, 8)).to(torch.int8)
    operands = x, weight, torch.rand(5) + 0.1, torch.rand(7) + 0.1
    y = (x.float() @ weight.float().T * operands[2][:, None] * operands[3]).to(torch.bfloat16)
    assert gpu_timing.is_right(y, operands)
    for at in ((-1, -1), (0, 0), (2, 3)):
        wrong = y.clone()
        wrong[at] += y.abs().max()
        assert not gpu_timing.is_right(wrong, operands)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        assert gpu_timing.is_right(y, (x.to(dtype), weight.to(dtype), *operands[2:]))


def test_operands_hold_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: generator())
    for name in ("randint", "randn"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, original=original, device, **k: original(*a, **k))
    x = gpu_timing.random(64, 300, "int8", 1)
    assert (x.dtype, tuple(x.shape), int(x.min()), int(x.max())) == (torch.int8, (64, 300), -127, 127)
    assert torch.equal(x, gpu_timing.random(64, 300, "int8", 1))
    assert not torch.equal(x, gpu_timing.random(64, 300, "int8", 2))
    assert gpu_timing.random(64, 300, "fp8", 1).dtype == torch.float8_e4m3fn


def test_a_compiled_kernel_does_not_depend_on_numbers_of_groups_and_parts() -> None:
    tile = Tile(64, 64, 64, group=4, split=8)
    assert compiled_form(tile) == compiled_form(dataclasses.replace(tile, group=16, split=2))
    assert compiled_form(tile) != compiled_form(dataclasses.replace(tile, split=1))
    assert compiled_form(tile) != compiled_form(dataclasses.replace(tile, tma=True))


class _Driver:
    """A GPU that is not here: kernels are compiled for it, and never loaded. Its number has no kernels yet."""

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 77

    def get_current_stream(self, device: int) -> int:
        return 0


def test_a_launch_finds_what_was_compiled_ahead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever its number of tokens, group and parts; and a tile that does not compile holds up no other."""
    triton = pytest.importorskip("triton")
    from qcompile.lowering import scaled_mm_hopper
    from qcompile.lowering import scaled_mm_kernel as kernel

    compiled: list[object] = []
    original = triton.compiler.compile

    def compile_counting(source: Any, **options: object) -> object:
        if 32 in source.constants.values():
            raise RuntimeError("does not compile")
        compiled.append(source)
        return original(source, **options)

    monkeypatch.setattr(triton.compiler, "compile", compile_counting)
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernel, "_workspace", None)
    monkeypatch.setattr(scaled_mm_hopper, "_processors", lambda device: 132)
    plain, split = Tile(16, 64, 128, swap=True, stages=2), Tile(16, 64, 128, swap=True, stages=2, split=2)
    tma, hopper = dataclasses.replace(plain, tma=True), Tile(64, 64, 128, hopper=True)
    cases = [(n, k, dtype, tile) for dtype in ("int8", "fp8") for n, k, tile in (
        (128, 256, plain), (128, 256, split), (128, 256, tma), (128, 256, hopper))]  # fmt: skip
    gpu_timing.compile_kernels([(128, 256, "int8", Tile(16, 64, 32)), *cases], "cpu", 2)
    assert len(compiled) == len(cases)
    for m, n, k in ((1, 128, 256), (16, 256, 512), (33, 4096, 1024)):
        for _, _, dtype, tile in cases:
            for form in (tile, dataclasses.replace(tile, group=3, split=8 if tile.split > 1 else 1)):
                x, weight = (torch.empty(rows, k, dtype=ops.TORCH_DTYPES[dtype]) for rows in (m, n))
                scales = torch.empty(m), torch.empty(n)
                operands = x, weight, *scales, None, None
                launched, _, grid, arguments, constants = kernel.launch_of(operands, "", torch.bfloat16, form)
                assert launched.warmup(*arguments, grid=grid, **constants) is not None
    assert len(compiled) == len(cases), "every launch hit"


@pytest.mark.inductor
def test_one_kernel_finishes_products_of_every_size() -> None:
    """One for each number of parts and dtype."""
    gpu_timing.finishing.cache_clear()
    torch._dynamo.utils.counters.clear()
    for parts, dtype in ((2, torch.int32), (4, torch.int32), (2, torch.float32)):
        for m, n in ((16, 96), (512, 64), (32, 4096)):
            sums = torch.randint(-99, 99, (parts, m, n)).to(dtype)
            scales = torch.rand(m), torch.rand(n)
            y = gpu_timing.finishing()(*scales, *sums.unbind())
            expected = (sums.sum(0).float() * (scales[0][:, None] * scales[1])).to(torch.bfloat16)
            torch.testing.assert_close(y, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
