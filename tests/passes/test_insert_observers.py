"""Every quantized linear's input is observed once; the outputs that were there stay in their places."""

import pytest
import torch
from graphs import Attention, GatedMLP, PostNorm, apply, captured, count, outputs
from probe import Body
from torch import Tensor, nn
from torch.fx import GraphModule

from qcompile import ops
from qcompile.captured import Captured
from qcompile.dump import graph_text
from qcompile.pass_pipeline import PassResult, Taken
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears, info_of, linears
from qcompile.passes.insert_observers import InsertObservers
from qcompile.rewrite import input_of, output_of
from qcompile.verify import Verify


def observed(model: nn.Module, *inputs: Tensor, ignore: tuple[str, ...] = ()) -> tuple[Captured, GraphModule]:
    subject = captured(model, *inputs)
    gm, _ = apply(subject, Canonicalize(), FindLinears(ignore), InsertObservers())
    return subject, gm


def names(gm: GraphModule) -> list[list[str]]:
    """The weights that each added output belongs to, by name."""
    by_index = {input_of(node).index: input_of(node).name for node in gm.graph.find_nodes(op="placeholder")}
    return [[by_index[index] for index in group] for group in gm.meta["observed"]]


def example() -> Tensor:
    return torch.randn(2, 5, 16)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (GatedMLP, [["gate_proj.weight", "up_proj.weight"], ["down_proj.weight"]]),
        (Attention, [["q_proj.weight", "k_proj.weight", "v_proj.weight"], ["o_proj.weight"]]),
        (PostNorm, [["fc1.weight"], ["fc2.weight"]]),
    ],
)
def test_one_observer_per_distinct_input(kind: type[nn.Module], expected: list[list[str]]) -> None:
    _, gm = observed(kind(), example())
    assert names(gm) == expected
    assert count(gm, ops.observe) == len(expected)
    assert len(output_of(gm.graph).args[0]) == 1 + 2 * len(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [GatedMLP, Attention, PostNorm])
def test_what_is_observed_is_the_absmax_of_what_each_linear_reads(kind: type[nn.Module]) -> None:
    subject, gm = observed(kind().double(), example().double())
    seen: dict[int, Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> object:
            if node in linears(gm):
                seen[info_of(node).parameter or -1] = self.env[node.args[0]]
            return super().run_node(node)

    with torch.no_grad():
        results = Watch(gm, garbage_collect_values=False).run(*subject.args)
    expected = outputs(subject.graph, subject)
    torch.testing.assert_close(list(results[: len(expected)]), expected, rtol=0, atol=0)
    added = results[len(expected) :]
    assert len(added) == 2 * len(gm.meta["observed"])
    for absmax, rows, parameters in zip(added[::2], added[1::2], gm.meta["observed"], strict=True):
        for parameter in parameters:
            x = seen[parameter].flatten(0, 1)
            torch.testing.assert_close(absmax, x.abs().amax(0).float(), rtol=0, atol=0)
            torch.testing.assert_close(rows, x[torch.arange(64) * len(x) // 64], rtol=0, atol=0)


def test_linears_that_stay_in_float_are_not_observed() -> None:
    _, gm = observed(GatedMLP(), example(), ignore=("up_proj", "down_proj"))
    assert names(gm) == [["gate_proj.weight"]]


def test_an_observer_may_stand_before_an_ignored_sibling() -> None:
    """The first reader of a tensor is not quantized, the second is."""
    _, gm = observed(GatedMLP(), example(), ignore=("gate_proj",))
    assert names(gm) == [["up_proj.weight"], ["down_proj.weight"]]
    gm.graph.lint()


def test_a_tied_weight_is_observed_at_both_of_its_inputs() -> None:
    model = Body(lambda m, x: m.fc(torch.relu(m.fc(x))), fc=nn.Linear(16, 16))
    _, gm = observed(model, example())
    assert names(gm) == [["fc.weight"], ["fc.weight"]]


def test_several_outputs_keep_their_places() -> None:
    subject, gm = observed(Body(lambda m, x: (x + 1, m.fc(x), x * 2), fc=nn.Linear(16, 16)), example())
    before, after = outputs(subject.graph, subject), outputs(gm, subject)
    assert len(after) == 5
    torch.testing.assert_close(after[:3], before, rtol=0, atol=0)


def test_the_verifier_agrees() -> None:
    subject = captured(Attention(), example())
    gm, _ = apply(subject, Canonicalize(), FindLinears())
    verify = Verify(full=True)
    verify.start(gm)
    result = InsertObservers().run(gm)
    assert result.changes == 6
    verify.step(Taken(0, InsertObservers(), None, gm, result, 0.0))


def test_twice_is_once() -> None:
    _, gm = observed(Attention(), example())
    before, meta = graph_text(gm), gm.meta["observed"]
    assert InsertObservers().run(gm) == PassResult(0)
    assert graph_text(gm) == before
    assert gm.meta["observed"] == meta


def test_a_graph_without_linears_keeps_its_text() -> None:
    subject, gm = observed(Body(lambda m, x: torch.softmax(x, -1)), example())
    assert graph_text(gm) == graph_text(subject.graph)
    assert gm.meta["observed"] == ()
    assert "observed" not in subject.graph.meta
