"""What a kernel reads and writes is found out once per form, and is what torch finds."""

from typing import Any

import pytest
import torch
from graphs import GatedMLP, captured
from torch._higher_order_ops import triton_kernel_wrap

import qcompile.passes as passes
from qcompile.config import Config
from qcompile.lowering import kernel_accesses
from qcompile.lowering.inductor import decompositions
from qcompile.lowering.kernel_accesses import NAMES, remembered
from qcompile.lowering.lower import lower
from qcompile.lowering.partition import partition
from qcompile.lowering.target import Target

pytest.importorskip("triton")

from absent_gpu import inductor_source

NAME = next(name for name in NAMES if hasattr(triton_kernel_wrap, name))
pretending = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU; tests/gpu uses it")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every question to torch, with nothing known at the beginning."""
    questions: list[Any] = []
    find = getattr(triton_kernel_wrap, NAME)

    def seen(kernel: Any, kwargs: dict[str, Any], *rest: Any) -> Any:
        questions.append(kwargs)
        return find(kernel, kwargs, *rest)

    monkeypatch.setattr(triton_kernel_wrap, NAME, seen)
    monkeypatch.setattr(kernel_accesses, "_known", {})
    return questions


def source(layers: int) -> str:
    model = torch.nn.Sequential(*(GatedMLP(128, 256) for _ in range(layers))).bfloat16()
    quantized, _ = passes.quantizing(Config()).run(captured(model, torch.randn(3, 128).bfloat16()).graph)
    run = partition(lower(quantized, Target("cuda", 90), decompositions())[0]).run
    text = inductor_source(run, Target("cuda", 90))
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))  # comments number what torch met


@pretending
@pytest.mark.inductor
def test_layers_ask_no_more_than_the_first(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one = source(1)
    few = len(asked)
    assert 2 <= few <= 2 * 2, "two products, each seen by functionalization and by Inductor's rewriting"
    three = source(3)
    assert len(asked) <= few + 2
    assert three.count("scaled_mm_kernel_0.run(") == 3 * one.count("scaled_mm_kernel_0.run(")
    monkeypatch.setattr(kernel_accesses, "NAMES", ())
    assert source(3) == three, "the code is the same without"
    assert len(asked) > 2 * few


def test_different_forms_are_asked_for(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel_wrap, NAME, lambda kernel, kwargs, *rest: asked.append(kwargs) or len(asked))
    x, wide, kernel, other = torch.ones(3), torch.ones(3, dtype=torch.float64), object(), object()
    with remembered():
        find = getattr(triton_kernel_wrap, NAME)
        forms = [(kernel, {"x": x, "n": 3}), (kernel, {"x": wide, "n": 3}), (kernel, {"x": x, "n": 1}),
                 (kernel, {"x": x, "n": True}), (kernel, {"y": x, "n": 3}), (other, {"x": x, "n": 3})]  # fmt: skip
        answers = [find(*form, {}) for form in forms]
        assert answers == [find(*form, {}) for form in forms] == [1, 2, 3, 4, 5, 6]
        assert find(kernel, {"x": torch.zeros(9), "n": 3}, {}) == 1, "sizes do not count"
        assert [find(kernel, {"x": x, "n": 3}, {"x": "a descriptor"}) for _ in range(2)] == [7, 8]


def test_it_ends_with_an_error_too() -> None:
    find = getattr(triton_kernel_wrap, NAME)

    def fail() -> None:
        assert getattr(triton_kernel_wrap, NAME) is not find
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"), remembered():
        fail()
    assert getattr(triton_kernel_wrap, NAME) is find


def test_what_is_known_does_not_grow_forever(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel_wrap, NAME, lambda *question: 0)
    monkeypatch.setattr(kernel_accesses, "MOST", 5)
    with remembered():
        for n in range(20):
            getattr(triton_kernel_wrap, NAME)(None, {"n": n}, {})
    assert len(kernel_accesses._known) <= 5
