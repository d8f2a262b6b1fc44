"""Names, groups, norms, and a sentence for every linear that stays in float."""

from typing import Any

import pytest
import torch
from graphs import Attention, GatedMLP, PostNorm, RMSNorm, apply, captured, count, outputs
from probe import Body
from tolerances import assert_close
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from qcompile.dump import graph_text
from qcompile.pass_pipeline import PassResult
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import LARGEST_K, FindLinears, LinearInfo, info_of, linears, matches, root_parameter
from qcompile.passes.smooth import Smooth
from qcompile.rewrite import input_of


def found(
    model: nn.Module, *inputs: Tensor, ignore: tuple[str, ...] = ("lm_head",), dynamic: bool = False
) -> tuple[GraphModule, PassResult, list[LinearInfo]]:
    gm, results = apply(captured(model, *inputs, dynamic=dynamic), Canonicalize(), FindLinears(ignore))
    return gm, results[-1], [info_of(node) for node in linears(gm)]


def example(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 16, dtype=dtype)


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "symbolic"])
def test_siblings_share_a_group_and_a_norm(dynamic: bool) -> None:
    _, result, infos = found(Attention(), example(), dynamic=dynamic)
    assert [(info.name, info.group, info.norm) for info in infos] == [
        ("q_proj", 0, "norm"),
        ("k_proj", 0, "norm"),
        ("v_proj", 0, "norm"),
        ("o_proj", 1, None),
    ]
    assert all(info.quantize and not info.reason for info in infos)
    assert result == PassResult(0)


def test_the_parameter_is_the_weights_place_among_the_inputs() -> None:
    gm, _, infos = found(GatedMLP(bias=True), example())
    names = {input_of(node).index: input_of(node).name for node in gm.graph.find_nodes(op="placeholder")}
    assert [names[info.parameter] for info in infos if info.parameter is not None] == [
        "gate_proj.weight",
        "up_proj.weight",
        "down_proj.weight",
    ]


class Gemma(nn.Module):
    """Gains are 1 + weight, computed in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.float())).to(x.dtype)


class WrittenOut(nn.Module):
    """LayerNorm from its definition."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.weight * (centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)) + self.bias


@pytest.mark.parametrize(
    "kind", [lambda: nn.LayerNorm(16), lambda: nn.RMSNorm(16), lambda: RMSNorm(16), Gemma, WrittenOut]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_spelling_of_a_norm_is_named(kind: Any, dtype: torch.dtype) -> None:
    model = Body(lambda m, x: m.fc(m.norm(x)), norm=kind(), fc=nn.Linear(16, 8)).to(dtype)
    _, _, (info,) = found(model, example(dtype))
    assert info.norm == "norm"


NO_NORM = {
    "the input": lambda m, x: m.fc(x),
    "a gelu": lambda m, x: m.fc(F.gelu(m.norm(x))),
    "a mere gain": lambda m, x: m.fc(x * m.norm.weight),
    "a norm without gain": lambda m, x: m.fc(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))),
    "a product of activations": lambda m, x: m.fc(m.norm(x) * x),
}


@pytest.mark.parametrize("name", NO_NORM)
def test_what_is_no_norm_is_not_named(name: str) -> None:
    model = Body(NO_NORM[name], norm=nn.LayerNorm(16), fc=nn.Linear(16, 8))
    _, _, (info,) = found(model, example())
    assert info.norm is None


@pytest.mark.parametrize(
    ("name", "patterns", "expected"),
    [
        ("lm_head", ("lm_head",), True),
        ("model.lm_head", ("lm_head",), True),
        ("model.lm_head.inner", ("lm_head",), False),
        ("model.lm_header", ("lm_head",), False),
        ("model.layers.0.mlp.gate", ("*.gate",), True),
        ("model.layers.0.mlp.gate_proj", ("*.gate", "gate"), False),
        ("model.layers.10.fc", ("layers.1?.*",), True),
        ("model.layers.1.fc", ("layers.1?.*",), False),
        ("Head", ("head",), False),
        ("anything", (), False),
        ("", ("*",), True),
    ],
)
def test_patterns_match_a_name_or_any_dotted_tail(name: str, patterns: tuple[str, ...], expected: bool) -> None:
    assert matches(name, patterns) is expected


def only_refusal(result: PassResult) -> str:
    (refusal,) = result.refusals
    assert refusal.rule == "find_linears"
    return refusal.reason


@pytest.mark.parametrize(
    ("ignore", "left"),
    [(("fc1",), ["fc1"]), (("fc?", "*head"), ["fc1", "fc2"]), (["fc1", "fc2"], ["fc1", "fc2"]), ((), [])],
    ids=str,
)
def test_ignored_names_stay_in_float(ignore: Any, left: list[str]) -> None:
    _, result, infos = found(PostNorm(), example(), ignore=ignore)
    assert [info.name for info in infos if not info.quantize] == left
    assert {refusal.reason for refusal in result.refusals} == {
        f"{name}: its name matches an ignore pattern" for name in left
    }


def test_a_constant_weight_stays_in_float() -> None:
    rows = torch.eye(8, 16).tolist()
    _, result, (info,) = found(Body(lambda m, x: F.linear(x, torch.tensor(rows))), example())
    assert "its weight is a constant of the graph, no parameter of the model" in only_refusal(result)
    assert info.parameter is None


def test_a_weight_of_vectors_stays_in_float() -> None:
    model = Body(lambda m, x: F.linear(x, m.v.view(1, 16) * m.v.view(16, 1)), v=nn.Parameter(torch.randn(16)))
    _, result, _ = found(model, example())
    assert "no parameter of the model" in only_refusal(result)


def test_integers_stay_as_they_are() -> None:
    weight = nn.Parameter(torch.randint(-9, 9, (8, 16)), requires_grad=False)
    model = Body(lambda m, x: F.linear(x, m.w), w=weight)
    _, result, _ = found(model, torch.randint(-9, 9, (5, 16)))
    assert only_refusal(result) == "w: its weight is int64, not a floating-point type"


@pytest.mark.parametrize(("n", "k"), [(8, 0), (0, 16), (0, 0)])
def test_no_channels_stay_in_float(n: int, k: int) -> None:
    model = Body(lambda m, x: F.linear(x, m.w), w=nn.Parameter(torch.empty(n, k)))
    _, result, _ = found(model, torch.randn(5, k))
    assert only_refusal(result) == f"w: its weight must be [N, K] with fixed sizes of at least 1, it is [{n}, {k}]"


def test_a_weight_cut_to_the_size_of_an_input_is_an_activation() -> None:
    model = Body(lambda m, x: F.linear(x, m.w[:, : x.shape[1]]), w=nn.Parameter(torch.randn(8, 64)))
    gm, _, infos = found(model, torch.randn(5, 13), dynamic=True)
    assert infos == []
    assert count(gm, torch.ops.aten.mm.default) == 1


@pytest.mark.parametrize("first", ["wide", "narrow"])
def test_a_parameters_second_reader_of_another_width_stays_in_float(first: str) -> None:
    """A tied autoencoder: W one way, Wᵀ the other. Statistics are kept by parameter."""

    def body(m: Any, x: Tensor) -> Tensor:
        if first == "wide":
            return F.linear(torch.relu(F.linear(x, m.w)), m.w.t())
        return F.linear(torch.relu(F.linear(x[..., :8], m.w.t())), m.w)

    model = Body(body, w=nn.Parameter(torch.randn(8, 16)))
    _, result, (one, other) = found(model, example())
    width = 16 if first == "wide" else 8
    assert (one.quantize, other.quantize) == (True, False)
    assert only_refusal(result).endswith(f"its parameter also serves a linear with {width} inputs")


def test_a_tied_weight_of_one_width_is_quantized_everywhere() -> None:
    model = Body(lambda m, x: m.fc(torch.relu(m.fc(x))), fc=nn.Linear(16, 16))
    _, result, infos = found(model, example())
    assert [info.quantize for info in infos] == [True, True]
    assert not result.refusals


def test_the_root_of_a_computed_weight_is_its_largest_matrix() -> None:
    model = Body(
        lambda m, x: F.linear(x, m.scale * (m.w + m.b @ m.a)),
        a=nn.Parameter(torch.randn(2, 16)),
        w=nn.Parameter(torch.randn(8, 16)),
        b=nn.Parameter(torch.randn(8, 2)),
        scale=nn.Parameter(torch.randn(16)),
    )
    gm, _, (info,) = found(model, example())
    (linear,) = linears(gm)
    root = root_parameter(linear.args[1])  # type: ignore[arg-type]
    assert root is not None
    assert input_of(root).name == "w"
    assert info.parameter == input_of(root).index


def test_products_of_activations_are_no_linears() -> None:
    gm, result, infos = found(Body(lambda m, x: x @ x.transpose(1, 2)), example())
    assert infos == []
    assert result == PassResult(0)
    before = graph_text(gm)
    assert FindLinears().run(gm) == PassResult(0)
    assert graph_text(gm) == before


def test_twice_is_once() -> None:
    gm, result, infos = found(Attention(), example(), ignore=("q_proj",))
    before = graph_text(gm)
    assert FindLinears(("q_proj",)).run(gm) == result
    assert graph_text(gm) == before
    assert [info_of(node) for node in linears(gm)] == infos


class Tied(nn.Module):
    """A head that reads the embedding's weight, behind a linear of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc, self.lm_head = nn.Embedding(24, 16), nn.Linear(16, 16), nn.Linear(16, 24, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.fc(self.embedding(ids)))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_tied_head_is_known_by_the_module_that_reads_it(wrapped: bool) -> None:
    model: nn.Module = nn.Sequential(Tied()) if wrapped else Tied()
    gm, _ = apply(captured(model, torch.arange(4)), Canonicalize(), FindLinears())
    fc, head = map(info_of, linears(gm))
    assert (fc.name.split(".")[-1], fc.quantize) == ("fc", True)
    assert (head.name.split(".")[-1], head.quantize) == ("lm_head", False)


COMPUTED: dict[str, Any] = {
    "tril": torch.tril,
    "eye": lambda w: w + torch.eye(16),
    "mask of arange": lambda w: torch.where(torch.arange(16)[:, None] >= torch.arange(16), w, 0.0),
    "zeros": lambda w: torch.cat([w[:8], torch.zeros(8, 16)]),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_may_be_computed_with_constants(kind: str) -> None:
    model = Body(lambda m, x: F.linear(m.norm(x), COMPUTED[kind](m.w)), norm=nn.LayerNorm(16), w=weight())
    subject = captured(model, torch.randn(2, 5, 16))
    gm, _ = apply(subject, Canonicalize(), FindLinears(), Smooth())
    (linear,) = linears(gm)
    assert info_of(linear).quantize
    assert_close("smooth/float32", actual=outputs(gm, subject)[0], expected=outputs(subject.graph, subject)[0])


def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(16, 16))


def test_a_pattern_that_is_text_is_one_pattern() -> None:
    assert FindLinears("lm_head").ignore == ("lm_head",)  # type: ignore[arg-type]
    assert FindLinears(["a", "b"]).ignore == ["a", "b"]


def test_sums_that_could_leave_int32_stay_in_float() -> None:
    for channels, kept in ((LARGEST_K, False), (LARGEST_K + 1, True)):
        model = torch.nn.Linear(channels, 2, bias=False).requires_grad_(False)
        gm, _ = apply(captured(model, torch.zeros(1, channels)), Canonicalize(), FindLinears())
        (linear,) = linears(gm)
        assert ("may leave int32" in info_of(linear).reason) == kept
    assert 127**2 * LARGEST_K < 2**31 <= 127**2 * (LARGEST_K + 1)
