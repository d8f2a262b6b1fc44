"""Whatever a model writes, one aten.linear is left; what is no linear stays as it was."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import GatedMLP, apply, captured, count, outputs, targets
from probe import Body
from tolerances import assert_close, row_for
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from qcompile.captured import Captured
from qcompile.dump import graph_text
from qcompile.passes.canonicalize import Canonicalize
from qcompile.rewrite import Origin, module_of

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


def canonical(subject: Captured) -> GraphModule:
    return apply(subject, Canonicalize())[0]


def products(gm: GraphModule) -> int:
    return sum(count(gm, target) for target in PRODUCTS)


def assert_same_numbers(subject: Captured, gm: GraphModule) -> None:
    expected, actual = outputs(subject.graph, subject), outputs(gm, subject)
    for before, after in zip(expected, actual, strict=True):
        assert_close(row_for("rewrite", before.dtype), actual=after, expected=before)


@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16), (2, 3, 5, 16), (1, 16), (1, 1, 16)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_linear_on_any_rank_is_one_node(shape: tuple[int, ...], bias: bool) -> None:
    subject = captured(nn.Linear(16, 24, bias=bias), torch.randn(shape))
    gm = canonical(subject)
    assert targets(gm) == ["aten.linear.default"]
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert [operand.op for operand in linear.all_input_nodes] == ["placeholder"] * (3 if bias else 2)
    assert tuple(linear.meta["val"].shape) == (*shape[:-1], 24)
    assert_same_numbers(subject, gm)


@pytest.mark.parametrize(("k", "n"), [(1, 1), (7, 3), (1, 5), (13, 1)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_odd_sizes(k: int, n: int, tokens: int) -> None:
    subject = captured(nn.Linear(k, n), torch.randn(tokens, k))
    gm = canonical(subject)
    assert targets(gm) == ["aten.linear.default"]
    assert_same_numbers(subject, gm)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_vector_is_a_matrix_of_one_row(bias: bool) -> None:
    subject = captured(nn.Linear(16, 24, bias=bias), torch.randn(16))
    gm = canonical(subject)
    assert (count(gm, aten.linear.default), products(gm)) == (1, 0)
    assert_same_numbers(subject, gm)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=str)
def test_no_tokens(shape: tuple[int, ...]) -> None:
    subject = captured(nn.Linear(16, 24), torch.randn(shape))
    gm = canonical(subject)
    assert targets(gm) == ["aten.linear.default"]
    assert outputs(gm, subject)[0].shape == (*shape[:-1], 24)


def test_no_output_channels() -> None:
    """view(x, [-1, 0]) would be ambiguous."""
    model = Body(lambda m, x: F.linear(x.view(-1, 16), m.weight), weight=nn.Parameter(torch.empty(0, 16)))
    subject = captured(model, torch.randn(2, 3, 16))
    assert outputs(canonical(subject), subject)[0].shape == (6, 0)


@dataclasses.dataclass(frozen=True)
class Spelling:
    """One way to write a linear: a body, and the parameters it uses."""

    body: Callable[..., Any]
    parameters: dict[str, tuple[int, ...]]


W, T = {"w": (24, 16)}, {"t": (16, 24)}
SPELLINGS = {
    "x @ w.t()": Spelling(lambda m, x: x @ m.w.t(), W),
    "x @ w.T.clone()": Spelling(lambda m, x: x @ m.w.T.clone(), W),
    "x @ w.permute(-1, -2)": Spelling(lambda m, x: x @ m.w.permute(-1, -2), W),
    "x @ t": Spelling(lambda m, x: x @ m.t, T),
    "a square t that is not transposed": Spelling(lambda m, x: x @ m.s.permute(0, 1), {"s": (16, 16)}),
    "t of a product": Spelling(lambda m, x: x @ (m.t @ m.s), {"t": (16, 8), "s": (8, 24)}),
    "lora": Spelling(lambda m, x: F.linear(x, m.w + m.b @ m.a), {**W, "b": (24, 3), "a": (3, 16)}),
    "lora with bias": Spelling(
        lambda m, x: F.linear(x, m.w + m.b @ m.a, m.c), {**W, "b": (24, 3), "a": (3, 16), "c": (24,)}
    ),
    "one expert of many": Spelling(lambda m, x: F.linear(x, m.e[1]), {"e": (3, 24, 16)}),
    "rows of a packed weight": Spelling(lambda m, x: F.linear(x, m.w[4:12]), W),
    "einsum": Spelling(lambda m, x: torch.einsum("...k,nk->...n", x, m.w), W),
    "einsum into heads": Spelling(lambda m, x: torch.einsum("bsk,knh->bsnh", x, m.h), {"h": (16, 4, 6)}),
    "on a transposed input": Spelling(lambda m, x: F.linear(x.transpose(1, 2), m.q, m.c), {"q": (7, 5), "c": (7,)}),
    "on a slice": Spelling(lambda m, x: F.linear(x[:, 1:, :8], m.q, m.c), {"q": (7, 8), "c": (7,)}),
    "on the transpose of a longer input": Spelling(
        lambda m, x: torch.matmul(x.transpose(1, 2).contiguous().transpose(1, 2), m.t), T
    ),
    "a batch of copies": Spelling(lambda m, x: torch.bmm(x, m.t.expand(2, 16, 24)), T),
    "a grid of copies": Spelling(
        lambda m, x: x[:, None].expand(2, 3, 5, 16) @ m.t[None, None].expand(2, 3, 16, 24), T
    ),
    "w @ xᵀ": Spelling(lambda m, x: m.w @ x[0].t(), W),
    "w @ xᵀ, batched": Spelling(lambda m, x: (m.w @ x.transpose(1, 2)).view(2, -1), W),
    "matmul": Spelling(lambda m, x: torch.matmul(x, m.t) + m.c, {**T, "c": (24,)}),
}


@functools.cache
def spelled(name: str, dynamic: bool) -> Captured:
    spelling = SPELLINGS[name]
    parameters = {key: nn.Parameter(torch.randn(shape)) for key, shape in spelling.parameters.items()}
    return captured(Body(spelling.body, **parameters), torch.randn(2, 5, 16), dynamic=dynamic)


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_a_linear(name: str) -> None:
    subject = spelled(name, False)
    gm = canonical(subject)
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert linear.args[1].meta["val"].ndim == 2
    assert not any(node.target in PRODUCTS and depends_on_input(node) for node in gm.graph.nodes)
    assert_same_numbers(subject, gm)


def depends_on_input(node: torch.fx.Node) -> bool:
    if node.op == "placeholder":
        return bool(node.meta["input"].kind == "activation")
    return any(map(depends_on_input, node.all_input_nodes))


def test_conv1d_is_a_linear_with_a_transposed_weight() -> None:
    model = Conv1D(24, 16)
    nn.init.normal_(model.bias)
    subject = captured(model, torch.randn(2, 5, 16))
    gm = canonical(subject)
    assert targets(gm) == ["aten.permute.default", "aten.linear.default"]
    assert_same_numbers(subject, gm)


@pytest.mark.parametrize("addend", ["activation", "row of a matrix", "scalar"])
def test_an_addend_that_is_no_bias_is_added_apart(addend: str) -> None:
    shapes = {"activation": (24,), "row of a matrix": (1, 24), "scalar": ()}

    def body(m: Any, x: Tensor) -> Tensor:
        return torch.addmm(torch.cat([x, x], 1)[:, :24] if addend == "activation" else m.c, x, m.t)

    model = Body(body, t=nn.Parameter(torch.randn(16, 24)), c=nn.Parameter(torch.randn(shapes[addend])))
    subject = captured(model, torch.randn(5, 16))
    gm = canonical(subject)
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert len(linear.args) == 2
    assert (count(gm, aten.add.Tensor), products(gm)) == (1, 0)
    assert_same_numbers(subject, gm)


@pytest.mark.parametrize("scales", [{"alpha": 2}, {"beta": 0.5}, {"alpha": 0, "beta": 0}], ids=str)
def test_a_scaled_addmm_is_refused(scales: dict[str, float]) -> None:
    model = Body(
        lambda m, x: torch.addmm(m.c, x, m.t, **scales),
        t=nn.Parameter(torch.randn(16, 24)),
        c=nn.Parameter(torch.randn(24)),
    )
    subject = captured(model, torch.randn(5, 16))
    gm, (result,) = apply(subject, Canonicalize())
    assert [refusal.reason for refusal in result.refusals] == ["addmm scales its sum (alpha, beta), no linear does"]
    assert graph_text(gm) == graph_text(subject.graph)


ALONE = {
    "two activations": lambda m, x: x @ x.transpose(1, 2),
    "an outer product": lambda m, x: m.t[:, :1] @ x[0, :1],
    "a batch of matrices": lambda m, x: x @ m.e,
    "a batch of matrices on the left": lambda m, x: m.e.transpose(1, 2) @ x.transpose(1, 2),
    "two matrices, each copied": lambda m, x: torch.bmm(x.repeat(2, 1, 1), m.e.repeat_interleave(2, 0)),
    "no product": lambda m, x: torch.softmax(x, -1) + 1,
    "parameters only": lambda m, x: x + (m.t.t() @ m.t).sum(),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_is_no_linear_is_left_alone(name: str) -> None:
    model = Body(ALONE[name], t=nn.Parameter(torch.randn(16, 24)), e=nn.Parameter(torch.randn(2, 16, 24)))
    subject = captured(model, torch.randn(2, 5, 16))
    gm = canonical(subject)
    assert count(gm, aten.linear.default) == 0
    assert products(gm) == products(subject.graph)
    assert_same_numbers(subject, gm)


@pytest.mark.parametrize("name", ["no product", "parameters only"])
def test_a_graph_with_nothing_to_match_keeps_its_text(name: str) -> None:
    model = Body(ALONE[name], t=nn.Parameter(torch.randn(16, 24)))
    subject = captured(model, torch.randn(2, 5, 16))
    gm, (result,) = apply(subject, Canonicalize())
    assert (result.changes, result.refusals) == (0, ())
    assert graph_text(gm) == graph_text(subject.graph)


@pytest.mark.parametrize("name", SPELLINGS)
def test_twice_is_once(name: str) -> None:
    gm = canonical(spelled(name, False))
    before = graph_text(gm)
    assert Canonicalize().run(gm).changes == 0
    assert graph_text(gm) == before


@pytest.mark.parametrize("name", ["x @ w.t()", "lora with bias", "einsum into heads", "on a transposed input"])
def test_symbolic_sizes(name: str) -> None:
    subject = spelled(name, True)
    gm = canonical(subject)
    assert count(gm, aten.linear.default) == 1
    assert not any(node.target in PRODUCTS and depends_on_input(node) for node in gm.graph.nodes)
    assert_same_numbers(subject, gm)


def test_a_linear_for_every_size() -> None:
    model = nn.Linear(16, 24).requires_grad_(False)
    subject = captured(model, torch.randn(2, 5, 16), dynamic=True)
    gm = canonical(subject)
    assert targets(gm) == ["aten.linear.default"]
    x = torch.randn(3, 4, 16)
    values = {2: 3, 5: 4}
    args = [values[arg] if isinstance(arg, int) else x if type(arg) is Tensor else arg for arg in subject.args]
    assert_close("rewrite/float32", actual=gm(*args)[0], expected=model(x))


def test_siblings_read_one_tensor() -> None:
    """Capture gives q, k and v three identical views of their input."""
    gm = canonical(captured(GatedMLP(), torch.randn(2, 5, 16)))
    gate, up, _ = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert gate.args[0] is up.args[0]


def test_identical_casts_and_slices_are_merged_and_others_are_not() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return x[:, :3].double() + x[:, :3].double() * x[:, 1:4].double()

    gm = canonical(captured(Body(body), torch.randn(2, 5, 16)))
    assert count(gm, aten.slice.Tensor) == 2
    assert count(gm, torch.ops.prims.convert_element_type.default) == 2


def test_views_that_change_nothing_go_and_chains_are_shortened() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return torch.relu(x.view(10, 16).view(2, 5, 16)) + x.view(160).view(2, 80).view(5, 32).view(2, 5, 16)

    subject = captured(Body(body), torch.randn(2, 5, 16))
    gm = canonical(subject)
    assert targets(gm) == ["aten.relu.default", "aten.add.Tensor"]
    assert_same_numbers(subject, gm)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    subject = captured(GatedMLP(bias=True).to(dtype), torch.randn(2, 5, 16, dtype=dtype))
    gm = canonical(subject)
    assert (count(gm, aten.linear.default), products(gm)) == (3, 0)
    assert_same_numbers(subject, gm)


def test_new_nodes_know_where_they_come_from() -> None:
    subject = captured(GatedMLP(), torch.randn(2, 5, 16))
    before = graph_text(subject.graph)
    gm = canonical(subject)
    names = ["gate_proj", "up_proj", "down_proj"]
    for name, node in zip(names, gm.graph.find_nodes(op="call_function", target=aten.linear.default), strict=True):
        assert isinstance(node.meta["origin"], Origin)
        assert node.meta["origin"].by == "canonicalize"
        assert module_of(node) == name
    assert graph_text(subject.graph) == before
