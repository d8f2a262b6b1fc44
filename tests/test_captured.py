"""Captured graphs know what their parameters are called, and who else reads them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Broken, BrokenUp
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from qcompile.capture import capture_call
from qcompile.captured import CODE, GRAPH, Captured, ReadsOutside
from qcompile.rewrite import input_of


def parameters(one: Captured) -> dict[str, str]:
    """Who else reads each parameter that a graph reads."""
    found = [input_of(node) for node in one.graph.graph.find_nodes(op="placeholder") if node.users]
    return {record.name: record.also_read_by for record in found if record.kind == "parameter"}


def others(model: nn.Module, **arguments: Any) -> dict[str, str]:
    """The same of all graphs of a call, for parameters that something else reads."""
    captured = capture_call(model.eval(), arguments or {"x": torch.randn(4, 16)})
    assert len(captured) > 1
    return {name: by for one in captured for name, by in parameters(one).items() if by}


def test_a_graph_that_is_reused_is_named_after_each_layer() -> None:
    captured = capture_call(Broken().eval(), {"x": torch.randn(4, 16)})
    assert len({id(one.graph.graph.owning_module) for one in captured}) == len(captured)
    layers = [{name.split(".")[1] for name in parameters(one)} for one in captured]
    assert layers == [{"0"}, {"1"}, {"2"}]
    for one in captured:
        for node in one.graph.graph.find_nodes(op="placeholder"):
            if (record := input_of(node)).kind == "parameter":
                assert node.meta["val"].shape == one.args[record.index].shape


def test_graphs_apart_share_nothing() -> None:
    assert others(BrokenUp()) == {}
    (only,) = capture_call(BrokenUp().first.eval(), {"x": torch.randn(4, 16)})
    assert set(parameters(only).values()) == {""}


def test_what_two_graphs_read() -> None:
    gain = dict.fromkeys(["first.norm.weight", "first.norm.bias"], GRAPH)
    assert others(BrokenUp(after=lambda model, h: model.first.norm(h))) == gain


def test_a_module_called_in_two_graphs() -> None:
    found = others(BrokenUp(after=lambda model, h: model.first(h)))
    assert set(found) == {f"first.{name}" for name, _ in BrokenUp().first.named_parameters()}
    assert set(found.values()) == {GRAPH}


READ: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda gain: 2 * gain,
    "detached": lambda gain: 2 * gain.detach(),
    "data": lambda gain: 2 * gain.data,
    "a view": lambda gain: gain.view(2, 8)[0].repeat(2),
    "in a list": lambda gain: torch.stack([gain, gain])[0],
}


@pytest.mark.parametrize("read", READ)
def test_what_code_between_graphs_reads(read: str) -> None:
    assert others(BrokenUp(between=lambda model: READ[read](model.second.norm.weight))) == {"second.norm.weight": CODE}


def test_what_is_read_around_a_single_graph() -> None:
    class Scaled(BrokenUp):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.uncompiled(x))

    (only,) = capture_call(Scaled(lambda model: 2 * model.first.norm.weight).eval(), {"x": torch.randn(4, 16)})
    assert {name for name, by in parameters(only).items() if by} == {"first.norm.weight"}


def test_a_parameter_that_is_handed_from_graph_to_graph() -> None:
    class Hands(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            gain, h = self.norm.weight, self.fc(self.norm(x))
            torch._dynamo.graph_break()
            return h * gain

    first, _ = capture_call(Hands().eval(), {"x": torch.randn(4, 16)})
    assert {name for name, by in parameters(first).items() if by == GRAPH} == {"norm.weight"}


def test_reads_of_other_memory_and_of_no_memory_are_none() -> None:
    model = nn.Linear(4, 4)
    with ReadsOutside(model) as reads, torch.no_grad():
        torch.ones(4) + 1
        torch.eye(4).to_sparse()
        model.weight.detach()
        assert not reads.memories
        model.weight.detach().t() @ torch.ones(4)
    assert len(reads.memories) == 1


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_operators_of_higher_order_may_run_between_graphs() -> None:
    def between(model: Any) -> Tensor:
        query = model.second.norm.bias.detach().view(1, 1, 1, 16)
        return flex_attention(query, torch.ones(1, 1, 4, 16), torch.randn(1, 1, 4, 16)).flatten()

    assert others(BrokenUp(between=between)) == {"second.norm.bias": CODE}
