"""Where the Triton kernel runs, what it takes, and what a lowered graph says of it. Numbers: test_scaled_mm_kernel."""

import importlib
import sys

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from qcompile.lowering import scaled_mm_triton as lowering
from qcompile.lowering import tiles
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import KINDS, Row, Table, Tile, pick

SM90, SM80 = Target("cuda", 90), Target("cuda", 80)
INT8 = torch.empty(4, 64, dtype=torch.int8)
FP8 = torch.empty(4, 64, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (SM90, ""), (SM80, ""), (Target("cuda", 120), ""),
        (Target("cuda", 75), "needs an NVIDIA GPU of compute capability 8.0 or newer, the target is cuda (sm75)"),
        (Target("cpu"), "needs an NVIDIA GPU"), (Target("hip", name="MI300X"), "needs an NVIDIA GPU"),
    ],
    ids=str,
)  # fmt: skip
def test_where_it_runs(target: Target, reason: str) -> None:
    pytest.importorskip("triton")
    assert lowering.runs_on(target).startswith(reason)
    assert bool(lowering.runs_on(target)) == bool(reason)


def test_without_triton_the_reason_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    lowering.not_installed.cache_clear()
    try:
        assert lowering.runs_on(SM90).startswith("needs Triton, which cannot be imported: ")
    finally:
        lowering.not_installed.cache_clear()


@pytest.mark.parametrize(
    ("target", "x", "weight", "reason"),
    [
        (SM90, INT8, INT8, ""),
        (SM90, FP8, FP8, ""),
        (SM80, INT8, INT8, ""),
        (SM80, FP8, FP8, "fp8 needs compute capability 8.9 or newer; this is cuda (sm80)"),
        (SM90, FP8, INT8, "needs operands of one dtype"),
        (SM90, INT8[:, :0], INT8[:, :0], "needs a weight with elements"),
        (SM90, INT8, torch.empty(0, 64, dtype=torch.int8), "needs a weight with elements"),
        (SM90, INT8, torch.empty(1, lowering.LARGEST_K, dtype=torch.int8), ""),
        (SM90, INT8, torch.empty(1, lowering.LARGEST_K + 1, dtype=torch.int8), "needs K ≤"),
        (SM90, FP8, torch.empty(1, lowering.LARGEST_K + 1, dtype=torch.float8_e4m3fn), ""),
    ],
)
def test_what_it_takes(target: Target, x: torch.Tensor, weight: torch.Tensor, reason: str) -> None:
    assert lowering.takes(target, x, weight).startswith(reason)
    assert bool(lowering.takes(target, x, weight)) == bool(reason)


def test_the_graph_holds_the_tile() -> None:
    """Leading dimensions are flattened, shapes come back, and the choice is an argument."""
    pytest.importorskip("triton")
    from torch.fx.experimental.proxy_tensor import make_fx

    measured = Table("here", "measured", (Row("int8", 16, 9, 64, Tile(16, 16, 32)),))

    def call(x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
        residual = torch.zeros(2, 3, 9)
        return lowering.scaled_mm(
            x, weight, x_scale, weight_scale, None, residual, "silu", torch.float16, target=SM90, measured=measured
        )

    with torch._subclasses.FakeTensorMode():
        x, weight = torch.empty(2, 3, 64, dtype=torch.int8), torch.empty(9, 64, dtype=torch.int8)
        for x_scale in (torch.empty(2, 3), torch.empty(())):
            graph = make_fx(call)(x, weight, x_scale, torch.empty(9)).graph
            (node,) = graph.find_nodes(op="call_function", target=torch.ops.qcompile_triton.scaled_mm.default)
            assert node.args[6:] == ("silu", torch.float16, [0, *Tile(16, 16, 32).to_ints()])
            assert node.args[0].meta["val"].shape == (6, 64)
            assert node.args[2].meta["val"].shape == ((6,) if x_scale.ndim else ())
            assert node.args[5].meta["val"].shape == (6, 9)
            assert len(node.args[8]) == len(KINDS) + 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_card_gets_the_tiles_that_were_measured_on_it(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    own = Table("NVIDIA H200", "measured", (Row("int8", 16, 9, 64, Tile(16, 16, 32)),))
    monkeypatch.setattr(tiles, "card", lambda name: own if name == own.device else None)
    with torch._subclasses.FakeTensorMode(shape_env=ShapeEnv()) as mode:
        real = torch.empty(5, 64, dtype=torch.int8)
        rows = mode.from_tensor(real, static_shapes=not dynamic)
        weight = torch.empty(9, 64, dtype=torch.int8)
        for name in ("NVIDIA H200", "NVIDIA H100"):
            chosen = lowering.tiles_for(rows.shape[0], weight, Target("cuda", 90, name=name), None)
            assert (pick(chosen, 5) == Tile(16, 16, 32)) == (name == own.device)


def test_the_kernel_is_imported_late() -> None:
    module = importlib.import_module("qcompile.lowering.select")
    assert not any("kernel" in name for name in vars(module))
