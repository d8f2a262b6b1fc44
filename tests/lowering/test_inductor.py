"""The last step: what Inductor compiles, and the same graph run op by op."""

import re
from typing import Any

import pytest
import torch
from compiling import by_hand, compiled, run
from graphs import GatedMLP, captured
from tolerances import assert_close, row_for
from torch import Tensor, nn
from torch.fx import GraphModule

import qcompile.passes as passes
from qcompile.config import Config
from qcompile.lowering import inductor
from qcompile.lowering.inductor import compile_eager, compile_inductor, decompositions, has_compiler
from qcompile.lowering.lower import lower
from qcompile.lowering.partition import partition
from qcompile.lowering.target import detect
from qcompile.rewrite import input_of
from qcompile.weights import evaluate


def run_graph_and_inputs() -> tuple[GraphModule, list[Any]]:
    torch.manual_seed(0)
    capture = captured(GatedMLP(), torch.randn(2, 5, 16))
    quantized, _ = passes.quantizing(Config()).run(capture.graph)
    lowered, _ = lower(quantized, detect(torch.device("cpu")), decompositions())
    split = partition(lowered)
    leaves = [capture.args[input_of(node).index] for node in split.prepare_inputs]
    prepared = evaluate(split.prepare, leaves, [entry.node for entry in split.prepared])
    return split.run, [capture.args[index] for index in split.run_inputs] + prepared


def test_eager_takes_the_list_over() -> None:
    run, inputs = run_graph_and_inputs()
    arguments = list(inputs)
    (result,) = compile_eager(run)(arguments)
    assert arguments == []
    assert torch.equal(result, run(*inputs)[0])


@pytest.mark.inductor
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_inductor_agrees_with_eager(mode: str | None) -> None:
    run, inputs = run_graph_and_inputs()
    with torch.no_grad():
        (expected,) = run(*inputs)
        (actual,) = compile_inductor(run, list(range(1, len(inputs))), mode)(list(inputs))
    assert_close("inductor/float32", actual=actual, expected=expected)


@pytest.mark.inductor
@pytest.mark.parametrize("asked", ["1", None])
def test_sizes_are_compared_at_each_call_only_if_asked(asked: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    if asked is None:
        monkeypatch.delenv("TORCHINDUCTOR_SIZE_ASSERTS")
    else:
        monkeypatch.setenv("TORCHINDUCTOR_SIZE_ASSERTS", asked)
    run, inputs = run_graph_and_inputs()
    with torch.no_grad(), config.patch(fx_graph_cache=False):
        _, (source,) = run_and_get_code(lambda: compile_inductor(run, [], None)(list(inputs)))
    asserts = re.search(r"^ +assert_size_stride\w*\(", source, re.MULTILINE)  # torch 2.14 has one for several operands
    assert (asserts is not None) == (asked == "1")


@pytest.mark.parametrize(
    ("mode", "device", "expected"),
    [
        ("reduce-overhead", "cuda", True), ("max-autotune", "cuda", True),
        (None, "cuda", False), ("reduce-overhead", "cpu", False),
    ],
)
def test_cuda_graphs_are_on_in_inductors_settings_too(
    mode: str | None, device: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its partitions look there, and not at what it is called with."""
    import torch._inductor.compile_fx as compile_fx
    from torch._inductor import config

    seen: list[tuple[bool, bool]] = []

    def stand_in(gm: Any, fakes: Any, **given: Any) -> Any:
        seen.append((bool(given["cudagraphs"].value), bool(config.triton.cudagraphs)))

    monkeypatch.setattr(compile_fx, "compile_fx_inner", stand_in)
    monkeypatch.setattr(compile_fx, "_recursive_joint_graph_passes", lambda gm, **_: gm)
    monkeypatch.setattr(inductor, "_device", lambda fakes: torch.device(device))
    compile_inductor(run_graph_and_inputs()[0], [], mode)
    assert seen == [(expected, expected)]


@pytest.mark.inductor
def test_sizes_are_compared_where_an_operator_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose fake says more rows than it returns: what follows would read and write beyond them."""
    monkeypatch.delenv("TORCHINDUCTOR_SIZE_ASSERTS")

    @torch.library.custom_op("qcompile_test::first_row", mutates_args=())
    def first_row(x: Tensor) -> Tensor:
        return x[:1].clone()

    @first_row.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(first_row(self.a(x)).relu() * 2)
            return y

    call = compiled(Model(), inner="inductor")
    with pytest.raises(AssertionError, match="expected size 1==5"):
        run(call, torch.randn(5, 64))


def test_a_missing_compiler_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.cpp_builder as builder

    def missing() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(builder, "get_cpp_compiler", missing)
    assert not has_compiler()


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize("transposed", ["x", "residual"])
def test_operands_are_laid_out_as_kernels_read_them(transposed: str) -> None:
    """Inductor would keep the layout of what a quantize step or a residual was made from."""
    linear = nn.Linear(32, 32)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return self.linear(x) + residual

    x, residual = torch.randn(32, 32), torch.randn(32, 32)
    arguments = (x.T, residual) if transposed == "x" else (x, residual.T)
    call = torch.compile(Model(), backend="w8a8", options={"inner": "inductor"})
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        actual, expected = call(*arguments), by_hand(Model())(*arguments)
    assert_close(row_for("rewrite", x.dtype), actual=actual, expected=expected)
