"""Captured graphs know what their parameters are called, and who else reads them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Broken, BrokenUp
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from qcompile.capture import capture_call
from qcompile.captured import CODE, GRAPH, INPUT, Captured, ReadsOutside
from qcompile.memory import span_of
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


def test_what_is_noted_of_reads() -> None:
    weight, plain, empty = nn.Parameter(torch.randn(4, 4)), torch.ones(4), torch.ones(0)
    with ReadsOutside() as reads, torch.no_grad():
        weight.detach()
        torch.empty(4, device="meta") + 1
        torch.eye(4).to_sparse()
        empty + 1
        assert not reads.parameters
        alias = weight.detach()
        alias.t() @ plain
        assert not reads.parameters
        weight + 1
    assert reads.parameters == {id(weight)}
    assert {span_of(weight), span_of(plain)} <= reads.spans
    assert None not in reads.spans


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.fc1, self.norm2, self.fc2 = (
            nn.LayerNorm(16), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.relu(self.fc1(self.norm1(x)))
        return x + torch.tanh(self.fc2(self.norm2(x)))


class Layers(nn.Module):
    """Dynamo compiles the first and reuses its graph for a second one that is tied in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x


@pytest.mark.parametrize("name", ["norm1.weight", "fc1.weight", "norm1.bias"])
def test_a_later_layer_that_is_tied_within(name: str) -> None:
    model = Layers()
    second, _, kind = name.replace("1", "2").partition(".")
    setattr(model.layers[1].get_submodule(second), kind, model.layers[1].get_parameter(name))
    found = others(model)
    assert set(found.values()) == {INPUT}
    assert {key.removeprefix("layers.1.") for key in found} <= {name, f"{second}.{kind}"}


def test_a_parameter_that_is_an_argument_too() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: Tensor, gain: Tensor) -> Tensor:
            return torch.relu(self.fc(self.norm(x))) * gain

    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.gain = nn.ModuleList(Gated() for _ in range(2)), nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            for index, layer in enumerate(self.layers):
                torch._dynamo.graph_break()
                x = layer(x, layer.norm.weight if index else self.gain)
            return x

    assert others(Gives())["layers.1.norm.weight"] == INPUT


def test_parameters_over_one_storage_are_told_apart() -> None:
    model, flat = BrokenUp(between=lambda model: 2 * model.second.norm.bias), torch.randn(4096)
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    assert others(model) == {"second.norm.bias": CODE}


def test_a_parameter_that_nobody_registered() -> None:
    class Hidden(BrokenUp):
        def __init__(self) -> None:
            super().__init__(between=lambda model: 2 * model.hidden[0].weight)
            self.hidden = [nn.LayerNorm(16)]

        def forward(self, x: Tensor) -> Tensor:
            return self.uncompiled(self.first.fc2(torch.relu(self.first.fc1(self.hidden[0](x)))))

    captured = capture_call(Hidden().eval(), {"x": torch.randn(4, 16)})
    assert [by for one in captured for by in parameters(one).values() if by] == [CODE]


def test_a_parameter_that_gets_other_memory_on_the_way() -> None:
    def between(model: Any) -> Tensor:
        gain = model.first.norm.weight
        found: Tensor = 2 * gain
        gain.data = gain.data.clone()
        return found

    assert others(BrokenUp(between=between)) == {"first.norm.weight": CODE}


def test_an_alias_that_goes_into_a_graph() -> None:
    class Aliases(BrokenUp):
        @torch.compiler.disable
        def uncompiled(self, x: Tensor) -> Tensor:
            return self.second.norm.weight.detach()

        def forward(self, x: Tensor) -> Tensor:
            gain = self.uncompiled(x)
            return self.second(x) * gain

    assert others_of_any(Aliases()) == {"second.norm.weight": INPUT}


def others_of_any(model: nn.Module) -> dict[str, str]:
    captured = capture_call(model.eval(), {"x": torch.randn(4, 16)})
    return {name: by for one in captured for name, by in parameters(one).items() if by}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_operators_of_higher_order_may_run_between_graphs() -> None:
    def between(model: Any) -> Tensor:
        query = model.second.norm.bias.detach().view(1, 1, 1, 16)
        return flex_attention(query, torch.ones(1, 1, 4, 16), torch.randn(1, 1, 4, 16)).flatten()

    assert others(BrokenUp(between=between)) == {"second.norm.bias": CODE}
