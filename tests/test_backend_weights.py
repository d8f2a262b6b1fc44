"""Compiled models and their weights: prepared once, shared by all graphs, never stale, never another model's."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import check, compiled, run
from graphs import PostNorm, ReluMLP
from tolerances import assert_close
from torch import Tensor, nn

import qcompile
from qcompile import backend, weights
from qcompile.weights import STORE, Binding

# Sharing


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> list[Binding]:
    """Every binding made while a test runs."""
    made: list[Binding] = []

    class Noted(Binding):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(backend, "Binding", Noted)
    return made


@pytest.mark.parametrize("options", [{}, {"calibrate": 1}], ids=["plain", "smoothed"])
def test_further_shapes_prepare_nothing(options: dict[str, Any], bindings: list[Binding]) -> None:
    call = compiled(ReluMLP(), **options)
    for _ in range(2):
        run(call, torch.randn(3, 16))
    computed = STORE.computed
    for shape in ((5, 16), (2, 7, 16), (1, 16), (3, 16)):
        y = run(call, torch.randn(shape))
        assert y.shape == shape
    assert STORE.computed == computed
    assert len(bindings) >= 3
    pointers = [{value.data_ptr() for value in binding.values} for binding in bindings]
    assert all(found == pointers[0] for found in pointers)


def test_a_repeated_call_binds_nothing(bindings: list[Binding]) -> None:
    call = compiled(ReluMLP())
    for _ in range(4):
        run(call, torch.randn(3, 16))
    assert len(bindings) == 1


def test_a_calibration_file_is_shared_too(tmp_path: Path, bindings: list[Binding]) -> None:
    model = ReluMLP().eval()
    qcompile.calibrate(model, [torch.randn(6, 16)]).save(tmp_path / "file")
    call = compiled(model, calibration=str(tmp_path / "file"))
    run(call, torch.randn(3, 16))
    computed = STORE.computed
    run(call, torch.randn(2, 5, 16))
    assert STORE.computed == computed
    assert len(bindings) == 2


def test_weights_are_released_with_the_model() -> None:
    gc.collect()
    model = ReluMLP()
    before = len(STORE._kept)
    call = compiled(model)
    run(call, torch.randn(3, 16))
    assert len(STORE._kept) > before
    torch._dynamo.reset()
    del call, model
    gc.collect()
    assert len(STORE._kept) == before


def test_weights_are_released_with_the_model_whatever_dynamo_keeps() -> None:
    gc.collect()
    model, before = ReluMLP(), len(STORE._kept)

    def step(x: Tensor) -> Tensor:  # whose compiled code outlives the model
        y: Tensor = models[0](x)
        return y

    models = [model]
    run(torch.compile(step, backend="w8a8", options={"inner": "eager"}), torch.randn(3, 16))
    assert len(STORE._kept) > before
    models.clear()
    del model
    gc.collect()
    assert len(STORE._kept) == before


# Live weights


def replace_data(model: ReluMLP) -> None:
    model.fc1.weight.data = torch.randn(24, 16)


def multiply_in_place(model: ReluMLP) -> None:
    with torch.no_grad():
        model.fc2.weight.mul_(-1.7)


def write_through_detach(model: ReluMLP) -> None:
    model.fc2.weight.detach().normal_()


def write_in_inference_mode(model: ReluMLP) -> None:
    with torch.inference_mode():
        model.fc1.weight.normal_()


def initialise(model: ReluMLP) -> None:
    nn.init.normal_(model.fc1.weight)
    nn.init.normal_(model.fc2.bias)


def load(model: ReluMLP) -> None:
    model.load_state_dict(ReluMLP().state_dict())


def load_assigning(model: ReluMLP) -> None:
    model.load_state_dict(ReluMLP().state_dict(), assign=True)


def swap_parameter(model: ReluMLP) -> None:
    model.fc1.weight = nn.Parameter(torch.randn(24, 16))


def swap_module(model: ReluMLP) -> None:
    model.fc1 = nn.Linear(16, 24)


def swap_modules_of_one_shape(model: nn.Module) -> None:
    model.fc1, model.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)


def change_bias_and_norm(model: ReluMLP) -> None:
    model.fc1.bias.data = torch.randn(24)
    with torch.no_grad():
        model.norm.weight.mul_(2)


def remove_bias(model: ReluMLP) -> None:
    model.fc1.bias = None


def step(model: ReluMLP) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(model.parameters(), 0.5).step()


def fused_step(model: ReluMLP) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(model.parameters(), 0.5, fused=True).step()


CHANGES = [
    replace_data, multiply_in_place, write_through_detach, write_in_inference_mode, initialise, load, load_assigning,
    swap_parameter, swap_module, swap_modules_of_one_shape, change_bias_and_norm, remove_bias, step,
    fused_step,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_numbers_follow_the_live_weights(change: Callable[[nn.Module], None]) -> None:
    model, x = ReluMLP(), torch.randn(4, 16)
    call = compiled(model)
    check(call, model, x)
    before = run(call, x)
    change(model)
    check(call, model, x)
    assert not torch.allclose(run(call, x), before)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_self_calibrated_model_follows_the_live_weights(change: Callable[[nn.Module], None]) -> None:
    model, x = ReluMLP(), torch.randn(4, 16)
    call = compiled(model, calibrate=1)
    for _ in range(2):
        run(call, x)
    change(model)
    for _ in range(2):
        assert_close("int8/model", actual=run(call, x), expected=run(model, x))
    settled = run(call, x)
    assert not torch.allclose(settled, run(model, x), rtol=1e-5)


def test_steps_for_other_models_bind_nothing(bindings: list[Binding]) -> None:
    call, x = compiled(ReluMLP()), torch.randn(4, 16)
    run(call, x)
    other = ReluMLP()
    versions = [parameter._version for parameter in other.parameters()]
    fused_step(other)
    run(call, x)
    assert len(bindings) == 1
    assert [parameter._version for parameter in other.parameters()] == versions


def test_weights_at_a_recycled_address_are_not_mistaken() -> None:
    """A new parameter with the id, address and version of one that is gone."""
    model, x = ReluMLP(), torch.randn(4, 16)
    memory = torch.randn(24, 16).numpy()
    model.fc1.weight = nn.Parameter(torch.from_numpy(memory))
    call = compiled(model)
    recycled = 0
    for _ in range(30):  # whether the allocator hands an id out again is luck
        check(call, model, x)
        before = identity(model.fc1.weight)
        memory[:] = torch.randn(24, 16).numpy()
        model.fc1.weight = None
        gc.collect()
        tried = [nn.Parameter(torch.from_numpy(memory))]
        while identity(tried[-1]) != before and len(tried) < 1000:
            tried.append(nn.Parameter(torch.from_numpy(memory)))
        model.fc1.weight = tried[-1]
        recycled += identity(tried[-1]) == before
        if recycled == 3:
            break
    assert recycled, "no id was recycled; the test shows nothing"
    check(call, model, x)


def identity(tensor: Tensor) -> tuple[int, int, int]:
    return id(tensor), tensor.data_ptr(), tensor._version


def test_models_at_recycled_addresses_are_not_mistaken() -> None:
    x = torch.randn(4, 16)
    for _ in range(6):
        model = ReluMLP()
        check(compiled(model), model, x)
        del model
        gc.collect()


def test_a_write_through_data_needs_a_refresh() -> None:
    model, x = ReluMLP(), torch.randn(4, 16)
    call = compiled(model)
    before = run(call, x)
    model.fc1.weight.data.mul_(-2)
    assert torch.equal(run(call, x), before), "if this fails, writes through .data are seen: drop refresh()"
    qcompile.refresh()
    check(call, model, x)


def test_refresh_reaches_every_model_and_shape() -> None:
    models = ReluMLP(), PostNorm()
    calls = [compiled(model) for model in models]
    shapes = (1, 16), (4, 16)
    for call in calls:
        for shape in shapes:
            run(call, torch.randn(shape))
    for model in models:
        for parameter in model.parameters():
            parameter.data.add_(0.1)
    weights.refresh()
    for call, model in zip(calls, models, strict=True):
        for shape in shapes:
            check(call, model, torch.randn(shape))


def test_two_models_of_one_shape_do_not_mix() -> None:
    models = [ReluMLP() for _ in range(3)]
    calls = [compiled(model) for model in models]
    for _ in range(2):
        x = torch.randn(4, 16)
        for call, model in zip(calls, models, strict=True):
            check(call, model, x)
    multiply_in_place(models[1])
    for call, model in zip(calls, models, strict=True):
        check(call, model, x)


def test_two_calibrations_of_one_model_do_not_mix() -> None:
    model, x = ReluMLP().eval(), torch.randn(4, 16)
    spread = torch.ones(16)
    spread[::4] = 100
    found = [qcompile.calibrate(model, [x]), qcompile.calibrate(model, [x * spread])]
    alone = []
    for calibration in found:
        torch._dynamo.reset()
        qcompile.refresh()
        alone.append(run(compiled(model, calibration=calibration), x))
    assert not torch.equal(alone[0], alone[1])
    torch._dynamo.reset()
    calls = [compiled(model, calibration=calibration) for calibration in found]
    for _ in range(2):
        for call, expected in zip(calls, alone, strict=True):
            assert torch.equal(run(call, x), expected)


def test_memory_that_comes_back_is_new_memory() -> None:
    """`.data =` twice: the second tensor may lie where the weight did when it was prepared."""
    memory = bytearray(64 * 64 * 4)

    def filled(value: float) -> Tensor:
        return torch.frombuffer(memory, dtype=torch.float32).view(64, 64).fill_(value)

    model, x = nn.Sequential(nn.Linear(64, 64, bias=False)), torch.randn(3, 64)
    call = compiled(model)
    weight = model[0].weight
    weight.data = filled(2.0)
    check(call, model, x)
    address, version = weight.data_ptr(), weight._version
    weight.data = torch.zeros(64, 64)
    weight.data = filled(-1.0)
    assert (weight.data_ptr(), weight._version) == (address, version), "told apart without what is tested here"
    check(call, model, x)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": torch.t,
    "overlapping": lambda weight: weight.as_strided((16, 16), (8, 1)),
    "fewer rows": lambda weight: weight[:8],
    "later rows": lambda weight: weight[8:],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_another_view_of_the_same_memory_is_another_weight(view: Callable[[Tensor], Tensor]) -> None:
    """`.data =` leaves the parameter, its address and its version as they were: structured pruning does that."""
    linear = nn.Linear(16, 16, bias=False)
    model, x = nn.Sequential(linear), torch.randn(4, 16)
    call = compiled(model)
    check(call, model, x)
    linear.weight.data = view(linear.weight.data)
    check(call, model, x)
