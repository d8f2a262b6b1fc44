"""The sweep: what it records, why it refuses, and that a graph for every size is analysed for every size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Attention, GatedMLP, PostNorm, ReluMLP, apply, captured
from probe import Body, probe
from torch import Tensor, nn
from torch.fx import Interpreter

from qcompile.captured import Captured
from qcompile.passes import gauge
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears, info_of
from qcompile.passes.gauge import Sweep, analyse
from qcompile.rewrite import input_of

aten = torch.ops.aten
K = 16


def sweep_of(model: nn.Module, *inputs: Tensor, **options: Any) -> Sweep:
    gm, _ = apply(captured(model, *inputs, **options), Canonicalize(), FindLinears(ignore=()))
    return analyse(gm)


def free_inputs(sweep: Sweep) -> dict[str, int]:
    """How many distinct free scales each linear's input channels have."""
    found = {}
    for linear, scales in sweep.linears.items():
        roots = sweep.variables.find(scales.inputs[sweep.variables.free(scales.inputs)])
        found[info_of(linear).name] = len(set(roots.tolist()))
    return found


def example() -> Tensor:
    return torch.randn(2, 5, K)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (GatedMLP, {"gate_proj": 16, "up_proj": 16, "down_proj": 24}),
        (Attention, {"q_proj": 16, "k_proj": 16, "v_proj": 16, "o_proj": 8}),  # two value heads serve four
        (PostNorm, {"fc1": 0, "fc2": 0}),
        (ReluMLP, {"fc1": 16, "fc2": 24}),
    ],
)
def test_which_scales_are_free(kind: type[nn.Module], expected: dict[str, int]) -> None:
    assert free_inputs(sweep_of(kind(), example())) == expected


def test_every_absorbing_parameter_is_recorded_once() -> None:
    sweep = sweep_of(ReluMLP(), example())
    uses = {input_of(use.static).name: use for use in sweep.uses}
    assert set(uses) == {"norm.weight", "norm.bias"}
    assert all(use.user.target is torch.ops.aten.native_layer_norm.default for use in uses.values())
    find = sweep.variables.find
    fc1, fc2 = sweep.linears.values()
    assert (find(uses["norm.weight"].labels) == find(uses["norm.bias"].labels)).all()
    assert (find(uses["norm.weight"].labels) == find(fc1.inputs)).all()
    assert (find(fc1.outputs) == find(fc2.inputs)).all()
    assert not sweep.variables.free(fc2.outputs).any()


def test_a_pin_names_the_op_and_the_module() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(K, 8), nn.GELU(), nn.Linear(8, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(x)))

    sweep = sweep_of(Model(), example())
    fc1, fc2 = sweep.linears.values()
    assert sweep.variables.reason(int(fc1.outputs[0])) == "no scale passes through, gelu in act"
    assert sweep.variables.reason(int(fc2.outputs[0])).startswith("returned from the model, output")
    assert sweep.variables.reason(int(fc2.inputs[0])) == "no scale passes through, gelu in act"


def test_frozen_parameters_are_pinned_with_their_reason() -> None:
    gm, _ = apply(captured(ReluMLP(), example()), Canonicalize(), FindLinears(ignore=()))
    sweep = analyse(gm, lambda static: "it is holy" if input_of(static).name == "fc1.bias" else "")
    assert free_inputs(sweep) == {"fc1": 16, "fc2": 0}
    (_, fc2) = sweep.linears.values()
    assert sweep.variables.reason(int(fc2.inputs[0])) == "it is holy, read by linear in fc1"


def test_static_operands_beyond_a_size_get_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauge, "LARGEST_VARIABLE_ARRAY", K - 1)
    sweep = sweep_of(ReluMLP(), example())
    assert sweep.uses == []
    assert free_inputs(sweep) == {"fc1": 0, "fc2": 24}


def test_the_cost_does_not_depend_on_tokens() -> None:
    sweep = sweep_of(Attention(), example())
    linear = next(iter(sweep.linears))
    assert sweep.labels(linear).stride()[:2] == (0, 0)
    (product,) = sweep._gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    assert sweep.labels(product).stride()[:2] == (0, 0)


@pytest.mark.parametrize(
    ("labels", "dims", "tied"),
    [
        ([[1, 2], [3, 4]], [0], [{1, 3}, {2, 4}]),
        ([[1, 2], [3, 4]], [0, 1], [{1, 2, 3, 4}]),
        ([[1, -1], [-1, 2]], [1], [{1}, {2}, {3}, {4}]),
        ([[-1, 3], [1, -1], [-1, 2]], [0], [{1}, {2, 3}, {4}]),
    ],
)
def test_unifying_along_dimensions(labels: list[list[int]], dims: list[int], tied: list[set[int]]) -> None:
    """Zeros (−1) speak for nobody: their neighbours are tied to one another all the same."""
    gm = captured(ReluMLP(), example()).graph
    sweep = Sweep(gm, lambda static: "")
    sweep.variables.fresh(4)
    node = next(iter(gm.graph.nodes))
    result = sweep.unify_along(torch.tensor(labels), dims, node, "")
    assert all(result.shape[dim] == 1 for dim in dims)
    roots = {label: int(sweep.variables.find(torch.tensor([label]).numpy())[0]) for label in range(1, 5)}
    assert {frozenset(k for k in roots if roots[k] == roots[one]) for one in roots} == set(map(frozenset, tied))


def test_unifying_along_nothing_gives_plain_values() -> None:
    gm = captured(ReluMLP(), example()).graph
    sweep = Sweep(gm, lambda static: "")
    result = sweep.unify_along(torch.zeros(2, 0, 3, dtype=torch.int64) + 7, [1], next(iter(gm.graph.nodes)), "")
    assert tuple(result.shape) == (2, 1, 3)
    assert not result.any()


# Sizes that are known by an example only. x is [S, K] with a symbolic S; each body means other channels or tokens
# when S changes.


def learned_tokens_behind(m: Any, x: Tensor) -> Tensor:
    """At S = 5 the first four tokens are all the norm's; at S = 3 one is learned."""
    return m.fc(torch.cat([m.norm(x), m.prefix])[:4])


def channels_from_a_symbolic_place(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    return m.pair(h[:, x.shape[0] - 2 : x.shape[0]]) + m.fc(h)[:, :4]


def up_to_a_symbolic_channel(m: Any, x: Tensor) -> Tensor:
    h = m.up(m.norm(x))
    return m.fc(h) + h[:, : x.shape[0]].sum(-1, keepdim=True)


def two_parts_that_meet_at_a_symbolic_place(m: Any, x: Tensor) -> Tensor:
    h, n = m.norm(x), x.shape[0]
    return m.fc(torch.cat([h[:, :n], m.up(h)[:, n:]], 1))


def padded_by_a_symbolic_width(m: Any, x: Tensor) -> Tensor:
    n = x.shape[0]
    return m.fc(nn.functional.pad(m.norm(x), (n, -n)))


def cut_in_symbolic_pieces(m: Any, x: Tensor) -> Tensor:
    h, n = m.norm(x), x.shape[0]
    left, right = h.split([n, K - n], 1)
    return m.fc(torch.cat([right, left], 1))


def tokens_and_channels_exchanged_by_a_reshape(m: Any, x: Tensor) -> Tensor:
    """At S = 4 each row of the result holds four channels; at S = 5 the rows overlap in all of them."""
    return m.fc(m.norm(x).reshape(K, x.shape[0]).sum(1))


def rows_of_another_width(m: Any, x: Tensor) -> Tensor:
    """K = 16 channels in rows of 12: at S = 6 every channel meets every fourth one, at S = 3 fewer do."""
    return m.twelve(m.norm(x).reshape(-1, 12))


def two_tokens_side_by_side(m: Any, x: Tensor) -> Tensor:
    return m.both(m.norm(x[: x.shape[0] // 2 * 2]).reshape(-1, 2 * K))


def half_a_token(m: Any, x: Tensor) -> Tensor:
    return m.eight(m.norm(x).reshape(-1, 8))


def the_last_half_token(m: Any, x: Tensor) -> Tensor:
    return m.eight(m.norm(x).reshape(-1, 8)[-3:])


def a_token_that_may_be_padding(m: Any, x: Tensor) -> Tensor:
    """The sixth token is a zero, which no scale changes, up to S = 5 only."""
    h = m.norm(x)
    return m.fc(h)[:1] + torch.softmax(nn.functional.pad(h, (0, 0, 0, 3))[5:6], -1)[:, :4]


SYMBOLIC = [
    learned_tokens_behind,
    channels_from_a_symbolic_place,
    up_to_a_symbolic_channel,
    two_parts_that_meet_at_a_symbolic_place,
    padded_by_a_symbolic_width,
    cut_in_symbolic_pieces,
    tokens_and_channels_exchanged_by_a_reshape,
    rows_of_another_width,
    two_tokens_side_by_side,
    half_a_token,
    the_last_half_token,
    a_token_that_may_be_padding,
]


@pytest.mark.parametrize("body", SYMBOLIC)
@pytest.mark.parametrize("tokens", [3, 4, 5, 6])
def test_an_analysis_at_one_size_holds_at_others(body: Callable[..., Tensor], tokens: int) -> None:
    if body is rows_of_another_width:
        tokens *= 3
    model = Body(
        body,
        norm=nn.LayerNorm(K),
        up=nn.Linear(K, K),
        fc=nn.Linear(K, 4),
        pair=nn.Linear(2, 4),
        eight=nn.Linear(8, 4),
        twelve=nn.Linear(12, 4),
        both=nn.Linear(2 * K, 4),
        prefix=nn.Parameter(torch.randn(3, K)),
    )
    found = probe(model, torch.randn(tokens, K, dtype=torch.float64), dynamic=True)
    found.assert_exact()
    for others in (3, 6, 9) if body is rows_of_another_width else (3, 4, 5, 7, 8):
        at = at_size(found.captured, others)
        with torch.no_grad():
            (before,) = Interpreter(at.graph).run(*at.args)
            torch.testing.assert_close(before, model(activation(at)))  # the graph is meant for this size too
        found.assert_exact(at)


def activation(subject: Captured) -> Tensor:
    (x,) = [value for value in subject.args if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)]
    return x


def at_size(subject: Captured, tokens: int) -> Captured:
    """The same graph with arguments of another length."""
    x = torch.randn(tokens, K, dtype=torch.float64)
    replaced = [
        tokens if isinstance(value, int) else x if value is activation(subject) else value for value in subject.args
    ]
    return Captured(subject.graph, replaced)


class EagerAttention(nn.Module):
    """Heads written out, so that batch and heads are one symbolic dimension for the two products."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(K)
        self.q, self.k, self.v, self.o = (nn.Linear(K, K) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (linear(h).unflatten(-1, (K, 1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


def test_batch_and_heads_in_one_symbolic_dimension_still_fold() -> None:
    found = probe(EagerAttention(), torch.randn(2, 5, K, dtype=torch.float64), dynamic=True)
    sizes = [
        str(node.meta["val"].shape[0])
        for node in found.gm.graph.find_nodes(op="call_function", target=aten.bmm.default)
    ]
    assert all(size.startswith(f"{K}*s") for size in sizes)
    assert found.folded == {"q", "k", "v", "o"}
    found.assert_exact()


def test_a_bias_that_is_computed_pins() -> None:
    """Capture adds it apart; a graph may hold it as a linear's third argument all the same."""
    model = Body(
        lambda m, x: torch.nn.functional.linear(m.norm(x), m.w), norm=nn.LayerNorm(K), w=nn.Parameter(torch.randn(K, K))
    )
    gm, _ = apply(captured(model, example()), Canonicalize())
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    with gm.graph.inserting_before(linear):
        bias = gm.graph.call_function(aten.sum.dim_IntList, (linear.args[0], [0, 1]))
    bias.meta["val"] = linear.meta["val"][0, 0]
    linear.args = (*linear.args, bias)
    sweep = analyse(gm)
    assert sweep.linears == {}
    (gain, *_) = sweep.uses
    assert sweep.variables.reason(int(gain.labels[0])) == f"no scale passes through, linear ({linear.name})"


def test_a_size_that_depends_on_data_is_left_to_run_time() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        model = Body(lambda m, x: m.fc(m.norm(x)[x[:, 0] > 0]), norm=nn.LayerNorm(K), fc=nn.Linear(K, 4))
        found = probe(model, torch.randn(5, K, dtype=torch.float64))
    assert "a size depends on data" in found.unfolded["fc"]
    found.assert_exact()
