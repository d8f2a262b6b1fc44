"""Which static tensors can be written back, and that writing back gives the tensor that was asked for."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import InFloat64, captured
from probe import Body, hostile, run, smoothed
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

import qcompile
from qcompile import ops
from qcompile.captured import Captured
from qcompile.passes.parameters import Source, source_of, why_frozen, why_not_copied
from qcompile.passes.smooth import Smooth
from qcompile.rewrite import args_of, input_of
from qcompile.weights import evaluate

aten = torch.ops.aten


def example() -> Tensor:
    return torch.randn(2, 3, 16)


def model(body: Callable[[Any, Tensor], Tensor]) -> Body:
    return Body(
        body,
        w=nn.Parameter(torch.randn(8, 16)),
        e=nn.Parameter(torch.randn(3, 8, 16)),
        h=nn.Parameter(torch.randn(16, 2, 4)),
        g=nn.Parameter(torch.randn(16)),
        other=nn.Parameter(torch.randn(16)),
    )


def static_of(body: Callable[[Any], Tensor]) -> tuple[Captured, GraphModule, Node]:
    """The graph of `x.sum() + body(parameters)`, and the node of the second term."""
    subject = captured(model(lambda m, x: x.sum() + body(m)), example())
    (total,) = subject.graph.graph.find_nodes(op="call_function", target=aten.add.Tensor)[-1:]
    static: Node = args_of(total)[1]
    return subject, subject.graph, static


UNDONE: dict[str, Callable[[Any], Tensor]] = {
    "itself": lambda m: m.g,
    "t": lambda m: m.w.t(),
    "transpose": lambda m: m.e.transpose(0, -1),
    "permute": lambda m: m.e.permute(2, 0, 1),
    "negative permute": lambda m: m.e.permute(-1, 0, -2),
    "view": lambda m: m.w.view(4, 4, 8),
    "flatten after permute": lambda m: m.h.permute(1, 2, 0).reshape(8, 16),
    "unsqueeze": lambda m: m.w.unsqueeze(1),
    "squeeze": lambda m: m.w[None].squeeze(0),
    "cast": lambda m: m.w.double(),
    "one plus": lambda m: 1.0 + m.g,
    "one plus in float64, transposed": lambda m: (m.w.double() + 1).t(),
    "a view of a copy of a cast": lambda m: m.w.double().t().contiguous().view(128),
}
NOT_UNDONE: dict[str, Callable[[Any], Tensor]] = {
    "sum of two": lambda m: m.g + m.other,
    "twice": lambda m: m.g * 2,
    "two minus": lambda m: 2 - m.g,
    "slice": lambda m: m.w[:4],
    "one expert": lambda m: m.e[1],
    "expanded": lambda m: m.g.expand(4, 16),
    "exponential": lambda m: m.g.exp(),
    "weight norm": lambda m: m.w / m.w.norm(),
    "added with alpha": lambda m: torch.add(m.g, 1, alpha=2),
    "repeated": lambda m: m.g.repeat(2),
}


@pytest.mark.parametrize("name", UNDONE)
def test_a_new_value_reaches_the_parameter(name: str) -> None:
    subject, gm, static = static_of(UNDONE[name])
    source = source_of(static)
    assert isinstance(source, Source), source
    assert why_frozen(static) == ""
    (value,) = evaluate(gm, subject.args, [static])
    wanted = torch.randn_like(value)
    index = input_of(source.parameter).index
    parameter = subject.args[index]
    edited = [*subject.args]
    edited[index] = source.undo(wanted)
    assert edited[index].shape == parameter.shape
    (again,) = evaluate(gm, edited, [static])
    torch.testing.assert_close(again, wanted)


@pytest.mark.parametrize("name", NOT_UNDONE)
def test_what_cannot_be_undone_says_so(name: str) -> None:
    _, _, static = static_of(NOT_UNDONE[name])
    source = source_of(static)
    assert isinstance(source, str)
    assert "is computed from parameters in a way that cannot be undone" in source
    assert why_frozen(static) == source


def test_a_constant_is_no_parameter() -> None:
    _, _, static = static_of(lambda m: torch.tensor([1.0, 2.0]))
    while static.op == "call_function":
        static = args_of(static)[0]
    assert source_of(static) == f"{static.name} is no parameter"


READ_TWICE: dict[str, Callable[[Any], Tensor]] = {
    "the parameter": lambda m: torch.relu(m.g) + m.g.sum(),
    "a transpose": lambda m: m.w.t().sum(1) + m.w.t().exp().sum(1),
    "both orientations": lambda m: m.w.t() @ m.w,
}


@pytest.mark.parametrize("name", READ_TWICE)
def test_a_parameter_with_two_readers_is_frozen(name: str) -> None:
    _, gm, _ = static_of(READ_TWICE[name])
    (parameter,) = [n for n in gm.graph.find_nodes(op="placeholder") if input_of(n).kind == "parameter" and n.users]
    readers = [node for node in gm.graph.nodes if parameter in node.all_input_nodes]
    frozen = [why_frozen(node) for node in (parameter, *readers) if isinstance(source_of(node), Source)]
    assert frozen
    assert set(frozen) == {f"{input_of(parameter).name} is read more than once"}


def written_back(subject: Captured, gm: GraphModule) -> list[Any]:
    """The captured arguments with every folded scale written into its parameter."""
    edits = [node for node in gm.graph.find_nodes(op="call_function", target=ops.rescale) if node.users]
    inputs = [
        subject.args[input_of(node).index] if input_of(node).of is None else hostile(node)
        for node in gm.graph.find_nodes(op="placeholder")
    ]
    args = [*subject.args]
    for node, value in zip(edits, evaluate(gm, inputs, edits), strict=True):
        source = source_of(args_of(node)[0])
        assert isinstance(source, Source), source
        index = input_of(source.parameter).index
        assert args[index] is subject.args[index], "written twice"
        args[index] = source.undo(value)
    return args


class Gemma(nn.Module):
    """A gain of 1 + g, a Conv1D weight and a relu."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.rand(16))
        self.w = nn.Parameter(torch.randn(16, 12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.g)
        return self.fc(torch.relu(h @ self.w))


def test_the_model_computes_the_same_with_edited_parameters() -> None:
    subject = captured(Gemma().double(), example().double())
    found = smoothed(subject, Smooth(absorb=False, edit="parameter"))
    assert not found.unfolded
    args = written_back(subject, found.gm)
    changed = [i for i, (a, b) in enumerate(zip(args, subject.args, strict=True)) if a is not b]
    assert [input_of(n).name for n in list(subject.graph.graph.nodes)[: len(args)] if input_of(n).index in changed] == [
        "g", "w", "fc.weight",
    ]  # fmt: skip
    with torch.no_grad():
        (after,) = InFloat64(subject.graph).run(*args)
    (before,) = run(subject.graph, subject)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)


TIED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "gain and bias": (lambda m, x: m.fc(F.layer_norm(x, [16], m.g) + m.g), "g is read more than once"),
    "weight": (lambda m, x: m.fc(torch.relu(m.sq(torch.relu(m.sq(x * m.g))))), "sq.weight is read more than once"),
    "computed": (lambda m, x: m.fc(torch.tanh(x) * (m.g * 2)), "cannot be undone"),
    "returned": (lambda m, x: m.fc(torch.tanh(x) * m.g) + m.g[:4], "g is read more than once"),
}


@pytest.mark.parametrize("name", TIED)
def test_tied_parameters_are_not_folded_into(name: str) -> None:
    body, reason = TIED[name]
    parts = {"fc": nn.Linear(16, 4), "sq": nn.Linear(16, 16), "g": nn.Parameter(torch.rand(16) + 0.5)}
    subject = captured(Body(body, **parts).double(), example().double())
    by_use = smoothed(subject, Smooth(absorb=False))
    in_place = smoothed(subject, Smooth(absorb=False, edit="parameter"))
    assert "fc" in by_use.folded
    assert reason in in_place.unfolded["fc"]
    by_use.assert_exact()
    in_place.assert_exact()
    written_back(subject, in_place.gm)


def test_batches_of_float_matrices_are_not_copied() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return torch.bmm(m.gain * x, m.experts) + m.fc(x)

    parts = {"experts": nn.Parameter(torch.randn(2, 16, 5)), "gain": nn.Parameter(torch.ones(16))}
    gm = captured(Body(body, fc=nn.Linear(16, 5), **parts), torch.randn(2, 3, 16)).graph
    reasons = {input_of(p).name: why_not_copied(p) for p in gm.graph.find_nodes(op="placeholder")}
    assert "stay in float" in reasons.pop("experts")
    assert not any(reasons.values())


def test_a_literal_zero_needs_no_edit() -> None:
    """0 · s = 0; any other constant would have to be scaled, and is no parameter."""
    folded = {}
    for constant in (0.0, 1.0):
        body = Body(
            lambda m, x, constant=constant: m.fc(torch.where(x > 1, torch.tensor(constant, dtype=x.dtype), m.up(x))),
            up=nn.Linear(16, 16),
            fc=nn.Linear(16, 4),
        )
        found = smoothed(captured(body.double(), example().double()), Smooth(absorb=False, edit="parameter"))
        folded[constant] = "fc" in found.folded
        found.assert_exact()
    assert folded == {0.0: True, 1.0: False}


def test_two_parameters_over_one_memory_stay() -> None:
    """Tied through `.data`, they look like two; scaling one would scale the other."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc, self.norm2, self.fc2 = (
                nn.LayerNorm(16), nn.Linear(16, 8), nn.LayerNorm(16), nn.Linear(16, 8),
            )  # fmt: skip
            self.fc2.weight.data = self.fc.weight.data

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(x)) + self.fc2(self.norm2(x))

    shared = Shared().eval()
    before = copy.deepcopy(shared.state_dict())
    qcompile.smooth(shared, qcompile.calibrate(shared, [example()]))
    assert all(torch.equal(value, before[name]) for name, value in shared.state_dict().items())
