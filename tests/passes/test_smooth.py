"""Smoothing changes no output, leaves no compensation out, and says what it could not fold."""

import functools
from typing import Any, Literal

import pytest
import torch
from graphs import Attention, GatedMLP, PostNorm, ReluMLP, apply, captured, count, outputs
from probe import Body, Probe, error, hostile, randomized, run, smoothed
from tolerances import assert_close, row_for
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qcompile import ops
from qcompile.captured import Captured
from qcompile.dump import graph_text
from qcompile.pass_pipeline import PassResult
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears, linears
from qcompile.passes.smooth import Smooth
from qcompile.rewrite import args_of, copy_graph, input_of

aten = torch.ops.aten
KINDS: dict[str, Any] = {
    "gated": lambda: GatedMLP(bias=True),
    "attention": lambda: Attention(bias=True),
    "one value head": lambda: Attention(kv_heads=1),
    "post-norm": PostNorm,
    "relu": ReluMLP,
    "gpt": lambda: nn.Sequential(Attention(), ReluMLP(), GatedMLP()),
}


@functools.cache
def subject(kind: str, dynamic: bool = False) -> Captured:
    model: nn.Module = KINDS[kind]()
    return captured(randomized(model), torch.randn(2, 5, 16, dtype=torch.float64), dynamic=dynamic)


def rescales(gm: GraphModule) -> list[Node]:
    return list(gm.graph.find_nodes(op="call_function", target=ops.rescale))


def moves(node: Node) -> bool:
    """Whether a node depends on the call's data."""
    if node.op == "placeholder":
        return input_of(node).kind == "activation"
    return any(map(moves, node.all_input_nodes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "symbolic"])
def test_smoothing_alone_changes_nothing(kind: str, absorb: bool, dynamic: bool) -> None:
    found = smoothed(subject(kind, dynamic), Smooth(absorb=absorb))
    found.assert_exact()
    assert rescales(found.gm) or not (absorb or found.folded)


@pytest.mark.parametrize(
    ("kind", "folded", "absorbed"),
    [
        ("gated", {"gate_proj", "up_proj", "down_proj"}, 0),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}, 0),
        ("one value head", {"q_proj", "k_proj", "v_proj", "o_proj"}, 0),
        ("post-norm", set(), 2),
        ("relu", {"fc1", "fc2"}, 0),
    ],
)
def test_what_folds_costs_no_node_at_run_time(kind: str, folded: set[str], absorbed: int) -> None:
    assert smoothed(subject(kind), Smooth(absorb=False)).folded == folded
    gm = smoothed(subject(kind), Smooth()).gm
    assert len([node for node in rescales(gm) if moves(node)]) == absorbed
    before = [node for node in subject(kind).graph.graph.nodes if node.op == "call_function" and moves(node)]
    canonical, _ = apply(subject(kind), Canonicalize())
    kept = [node for node in canonical.graph.nodes if node.op == "call_function" and moves(node)]
    after = [node for node in gm.graph.nodes if node.op == "call_function" and moves(node)]
    assert len(after) == len(kept) + absorbed <= len(before) + absorbed


def edits(gm: GraphModule) -> list[tuple[Node, Node | None]]:
    """Every compensation that could be left out: a scaled tensor as a whole, or one of its several factors."""
    found: list[tuple[Node, Node | None]] = []
    for node in rescales(gm):
        found.append((node, None))
        found += [(node, factor) for factor in args_of(node)[1]] if len(args_of(node)[1]) > 1 else []
    return found


def without(gm: GraphModule, edit: tuple[Node, Node | None]) -> GraphModule:
    """A copy in which one compensation is missing."""
    copied = copy_graph(gm)
    node, factor = edit
    scaled = next(other for other in copied.graph.nodes if other.name == node.name)
    x, factors = args_of(scaled)
    if factor is None:
        scaled.replace_all_uses_with(x)
    else:
        scaled.args = (x, [kept for kept in factors if kept.name != factor.name])
    copied.recompile()
    return copied


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_out_any_one_compensation_shows(kind: str) -> None:
    found = smoothed(subject(kind), Smooth())
    expected = run(found.captured.graph, found.captured)
    assert error(run(found.gm, found.captured), expected) < 1e-9
    wrong = {str(edit): error(run(without(found.gm, edit), found.captured), expected) for edit in edits(found.gm)}
    assert len(wrong) >= 4
    assert min(wrong.values()) > 1e-6, min(wrong, key=wrong.__getitem__)


@pytest.mark.parametrize("kind", ["gated", "relu", "post-norm"])
def test_the_factor_is_equation_4(kind: str) -> None:
    """s_k = max|x_k|^α / max|W_k|^(1−α), over all linears that share x."""
    alpha = 0.3
    found = smoothed(subject(kind), Smooth(alpha))
    values = values_of(found)
    scales = found.gm.graph.find_nodes(op="call_function", target=ops.smoothing_scale)
    assert scales
    for scale in scales:
        absmax, weights, index, components, a = args_of(scale)
        assert a == alpha
        for one in range(1, components + 1):
            x = max(float(values[s][values[i] == one].max()) for s, i in zip(absmax, index, strict=True))
            w = max(
                float(values[w].detach()[:, values[i] == one].abs().max()) for w, i in zip(weights, index, strict=True)
            )
            torch.testing.assert_close(float(values[scale][one]), x**alpha / w ** (1 - alpha))


def test_siblings_are_scaled_together_and_ignored_ones_compensated() -> None:
    gm, _ = apply(subject("gated"), Canonicalize(), FindLinears(("gate_proj",)), Smooth())
    first, second = gm.graph.find_nodes(op="call_function", target=ops.smoothing_scale)
    assert {len(args_of(first)[1]), len(args_of(second)[1])} == {1}  # gate_proj decides nothing
    gate, up, _ = linears(gm)
    assert args_of(gate)[1].target is ops.rescale
    assert args_of(gate)[1].args[1] == args_of(up)[1].args[1][:1]
    assert_close("smooth/float64", actual=run(gm, subject("gated"))[0], expected=outputs(*pair("gated"))[0])


def pair(kind: str) -> tuple[GraphModule, Captured]:
    return subject(kind).graph, subject(kind)


def test_without_absorbing_every_unfolded_linear_is_refused() -> None:
    found = smoothed(subject("post-norm"), Smooth(absorb=False))
    assert set(found.unfolded) == {"fc1", "fc2"}
    assert "native_layer_norm in out" in found.unfolded["fc1"]
    assert "gelu" in found.unfolded["fc2"]
    assert not rescales(found.gm)
    assert not [n for n in found.gm.graph.find_nodes(op="placeholder") if input_of(n).kind == "statistic"]


def test_with_absorbing_nothing_is_refused() -> None:
    _, (_, _, result) = apply(subject("post-norm"), Canonicalize(), FindLinears(()), Smooth())
    assert result.refusals == ()


def test_too_coarse_a_tie_is_smoothed_at_run_time_and_refused_without() -> None:
    """16 heads of one channel read one value channel."""

    def body(m: Any, x: Tensor) -> Tensor:
        return m.o(m.v(m.norm(x)).expand(2, 5, 16))

    model = Body(body, norm=nn.LayerNorm(16), v=nn.Linear(16, 1), o=nn.Linear(16, 4))
    coarse = captured(randomized(model), torch.randn(2, 5, 16, dtype=torch.float64))
    refused, absorbed = smoothed(coarse, Smooth(absorb=False)), smoothed(coarse, Smooth())
    assert "tied so coarsely" in refused.unfolded["o"]
    (divided,) = [node for node in rescales(absorbed.gm) if moves(node)]
    assert [info.name for info in divided.users] == [linears(absorbed.gm)[1].name]
    refused.assert_exact()
    absorbed.assert_exact()


def test_a_coarse_tie_of_one_reader_still_serves_the_others() -> None:
    """down folds each channel; sum's single scale would serve them all, and reads compensated channels."""

    def body(m: Any, x: Tensor) -> Tensor:
        h = m.norm(x)
        return m.fine(h) + m.coarse(torch.cat([h, h.sum(-1, keepdim=True).expand(2, 5, 16)], -1))

    model = Body(body, norm=nn.LayerNorm(16), fine=nn.Linear(16, 4), coarse=nn.Linear(32, 4))
    for absorb in (True, False):
        smoothed(
            captured(randomized(model), torch.randn(2, 5, 16, dtype=torch.float64)), Smooth(absorb=absorb)
        ).assert_exact()


def test_part_of_a_linear_may_fold_and_the_rest_be_absorbed() -> None:
    model = Body(lambda m, x: m.fc(torch.cat([m.norm(x), x], -1)), norm=nn.LayerNorm(16), fc=nn.Linear(32, 8))
    found = smoothed(captured(randomized(model), torch.randn(2, 5, 16, dtype=torch.float64)), Smooth())
    (divided,) = [node for node in rescales(found.gm) if moves(node)]
    inverse = values_of(found)[args_of(divided)[1][0]]
    assert (inverse[:16] == 1).all()
    assert (inverse[16:] != 1).all()
    found.assert_exact()


def values_of(found: Probe) -> dict[Node, Any]:
    """Every node's value under hostile statistics."""

    class Keep(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    values: dict[Node, Any] = {}
    inputs = []
    for node in found.gm.graph.find_nodes(op="placeholder"):
        record = input_of(node)
        inputs.append(found.captured.args[record.index] if record.of is None else hostile(node))
    with torch.no_grad():
        Keep(found.gm).run(*inputs)
    return values


@pytest.mark.parametrize("edit", ["use", "parameter"])
def test_a_tied_head_gets_a_scaled_copy_or_nothing(edit: Literal["use", "parameter"]) -> None:
    """An embedding that is also the head: the shared tensor itself must stay as it is."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(7, 16), nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.norm(self.embed(x)), self.embed.weight)

    tied = captured(randomized(Tied()), torch.arange(6).reshape(2, 3))
    found = smoothed(tied, Smooth(absorb=False, edit=edit))
    found.assert_exact()
    if edit == "use":
        assert found.folded == {"embed"}
    else:
        assert "embed.weight is read more than once" in found.unfolded["embed"]
    (embedding,) = found.gm.graph.find_nodes(op="call_function", target=aten.embedding.default)
    assert args_of(embedding)[0].op == "placeholder"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["gated", "attention", "relu", "post-norm"])
def test_in_narrow_dtypes_only_rounding_changes(kind: str, dtype: torch.dtype) -> None:
    model: nn.Module = KINDS[kind]().to(dtype)
    narrow = captured(model, torch.randn(2, 5, 16, dtype=dtype))
    gm, _ = apply(narrow, Canonicalize(), FindLinears(()), Smooth())
    for after, before in zip(outputs(gm, narrow, 3.0), outputs(narrow.graph, narrow), strict=True):
        assert_close(row_for("smooth", dtype), actual=after, expected=before)


@pytest.mark.parametrize("kind", KINDS)
def test_twice_is_once(kind: str) -> None:
    for step in (Smooth(), Smooth(absorb=False)):
        gm = smoothed(subject(kind), step).gm
        before = graph_text(gm)
        again = step.run(gm)
        assert again.changes == 0
        assert graph_text(gm) == before


NOTHING: dict[str, Any] = {
    "no linear": lambda m, x: torch.softmax(x, -1),
    "ignored": lambda m, x: m.fc(m.norm(x)),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_graph_with_nothing_to_smooth_keeps_its_text(name: str) -> None:
    model = Body(NOTHING[name], norm=nn.LayerNorm(16), fc=nn.Linear(16, 8))
    gm, _ = apply(captured(model, torch.randn(2, 5, 16)), Canonicalize(), FindLinears(("fc",)))
    before = graph_text(gm)
    assert Smooth().run(gm) == PassResult(0)
    assert graph_text(gm) == before


def test_unseen_and_empty_channels_keep_a_factor_of_one() -> None:
    """Channels that calibration never saw, or whose weights are all zero, have no scale to speak of."""
    model = Body(lambda m, x: m.fc(m.norm(x)), norm=nn.LayerNorm(16), fc=nn.Linear(16, 8))
    with torch.no_grad():
        model.get_parameter("fc.weight")[:, 3] = 0
    one = captured(randomized(model), torch.randn(2, 5, 16, dtype=torch.float64))
    gm, _ = apply(one, Canonicalize(), FindLinears(()), Smooth())
    absmax = torch.ones(16)
    absmax[5], absmax[6] = 0, 1e-38
    (after,) = outputs(gm, one, {"fc.weight": absmax})
    assert torch.isfinite(after).all()
    assert_close("smooth/float64", actual=after, expected=outputs(one.graph, one)[0])


def test_a_cache_pins_what_it_stores() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.v, self.o = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.register_buffer("cache", torch.randn(2, 8, 16))

        def forward(self, x: Tensor) -> Tensor:
            cache = self.get_buffer("cache")
            cache[:, 3:6] = self.v(self.norm(x))
            return self.o(cache)

    found = smoothed(captured(randomized(Cached()), torch.randn(2, 3, 16, dtype=torch.float64)), Smooth(absorb=False))
    assert found.folded == {"v"}
    assert count(found.gm, aten.copy_.default) == 1
    found.assert_exact()
    written = [values_of(found)[n] for n in found.gm.graph.find_nodes(op="call_function", target=aten.copy_.default)]
    expected = Probe(found.captured, copy_graph(found.captured.graph), {})
    before = [
        values_of(expected)[n] for n in expected.gm.graph.find_nodes(op="call_function", target=aten.copy_.default)
    ]
    assert_close("smooth/float64", actual=written[0], expected=before[0])
