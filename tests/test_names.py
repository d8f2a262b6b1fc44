"""Parameters keep the names that the user's model gives them."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import captured
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from qcompile import names
from qcompile.captured import Captured
from qcompile.rewrite import input_of


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['fc']._parameters['weight']", "fc.weight"),
        ("L['self']._modules['layers']._modules['0']._modules['fc']._parameters['bias']", "layers.0.fc.bias"),
        ("L['model']._modules['rotary']._buffers['inv_freq']", "rotary.inv_freq"),
        ("L['self']._parameters['weight']", "weight"),
        ("G['model']._modules['a-b c']._parameters['weight']", "a-b c.weight"),
        ("L['x']", None),
        ("L['self'].scale", None),
        ("", None),
    ],
)
def test_a_source_gives_the_dotted_path(source: str, name: str | None) -> None:
    assert names.source_name(source) == name


@pytest.mark.parametrize(
    ("parameter", "module"),
    [
        ("layers.0.fc.weight", "layers.0.fc"),
        ("fc.weight", "fc"),
        ("fc.parametrizations.weight.original", "fc"),
        ("layers.3.fc.parametrizations.weight.original1", "layers.3.fc"),
        ("experts.gate_up_proj", "experts"),
        ("original.fc.weight", "original.fc"),
    ],
)
def test_a_parameter_belongs_to_its_module(parameter: str, module: str) -> None:
    assert names.module_name(parameter) == module


def parameter_names(graph: Captured) -> set[str]:
    records = [input_of(node) for node in graph.graph.graph.find_nodes(op="placeholder")]
    return {record.name for record in records if record.kind == "parameter"}


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights_are_named_as_the_model_names_them(parametrize: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parametrize(model[1])
    found = parameter_names(captured(model, torch.randn(2, 4)))
    assert found <= {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert {names.module_name(name) for name in found if "original" in name} == {"1"}


def test_registered_tensors_are_found_by_identity() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    names.register(model)
    assert names.name_of(model[0].weight) == "0.weight"
    assert names.name_of(model[1].running_mean) == "1.running_mean"
    assert names.name_of(model[0].weight.detach()) is None
    assert names.name_of(torch.clone(model[0].weight)) is None


def test_the_last_registration_counts() -> None:
    model = nn.Linear(4, 4)
    names.register(model)
    names.register(nn.ModuleDict({"inner": model}))
    assert names.name_of(model.weight) == "inner.weight"


def test_names_die_with_their_tensors() -> None:
    gc.collect()
    before = len(names._names)
    model = nn.Linear(4, 4)
    names.register(model)
    assert len(names._names) == before + 2
    names.register(model)
    del model
    gc.collect()
    assert len(names._names) == before


def test_a_new_tensor_at_an_old_address_has_no_name() -> None:
    for _ in range(50):
        tensor = torch.zeros(4)
        assert names.name_of(tensor) is None
        names.register(nn.ParameterDict({"weight": nn.Parameter(tensor)}))
        del tensor


calling_model = torch.compiler.disable(names.calling_model)


class Asking(nn.Module):
    """Notes which model is being called."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.answer: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.answer = calling_model()
        return x if self.inner is None else self.inner(x)


def test_the_calling_model_is_the_outermost() -> None:
    inner = Asking()
    outer = Asking(inner)
    outer(torch.zeros(1))
    assert outer.answer is outer
    assert inner.answer is outer


def test_a_compiled_module_on_the_stack_is_nearer() -> None:
    inner = Asking()
    outer = Asking(torch.compile(inner, backend="eager"))  # type: ignore[arg-type]
    outer(torch.zeros(1))
    assert outer.answer is outer
    assert inner.answer is inner


def test_without_a_model_there_is_none() -> None:
    assert names.calling_model() is None


def test_parameters_and_buffers_are_static() -> None:
    assert names.is_static(nn.Parameter(torch.zeros(1)), "L['self']._parameters['weight']")
    assert names.is_static(nn.Parameter(torch.zeros(1)), "L['parameters']['weight']")
    assert not names.is_static(nn.Parameter(torch.zeros(1)), "L['x']"), "what the caller passes is data"
    assert names.is_static(torch.zeros(1), "L['self']._buffers['cos']")
    assert not names.is_static(torch.zeros(1), "L['x']")
    assert not names.is_static(3, "L['self']._buffers['cos']")


def test_a_tied_parameter_has_several_names() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embedding"].weight
    names.register(model)
    assert names.names_of(model["head"].weight) == ("embedding.weight", "head.weight")
    assert names.name_of(model["head"].weight) == "embedding.weight"
    assert names.names_of(torch.zeros(3)) == ()
