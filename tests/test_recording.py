"""calibrate: what every linear read over the user's batches, under the model's own names."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import GatedMLP, ReluMLP
from tolerances import assert_close
from torch import Tensor, nn

import qcompile
from qcompile import debug
from qcompile.calibration import Calibration
from qcompile.call_arguments import LONGEST
from qcompile.errors import CalibrationError
from qcompile.quantized_linear import QuantizedLinear


class Tokens(nn.Module):
    """Reads token ids, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.mlp = GatedMLP()
        self.lm_head = nn.Linear(16, 50)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        h = self.embed(input_ids)
        if attention_mask is not None:
            h = h * attention_mask[..., None]
        return self.lm_head(self.mlp(h) * scale)


def batches() -> list[Tensor]:
    return [torch.randint(0, 50, shape) for shape in ((2, 7), (1, 40), (3, 5))]


def read_by_hand(model: nn.Module, calls: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Absmax of every linear's input, by forward hooks."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(f"{name}.weight", []).append(
                args[0].abs().flatten(0, -2).amax(0)
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for arguments in calls:
            model(**arguments)
    for handle in handles:
        handle.remove()
    return {name: torch.stack(values).amax(0) for name, values in seen.items()}


def check_statistics(
    found: Calibration, model: nn.Module, calls: list[dict[str, Any]], without: str = "lm_head"
) -> None:
    expected = read_by_hand(model, calls)
    assert found.statistics.keys() == {name for name in expected if not name.startswith(without)}
    for name, statistic in found.statistics.items():
        torch.testing.assert_close(statistic.absmax, expected[name], rtol=1e-6, atol=0)


def test_statistics_are_the_absmax_of_what_linears_read() -> None:
    model, data = Tokens().eval(), batches()
    found = qcompile.calibrate(model, data)
    check_statistics(found, model, [{"input_ids": ids} for ids in data])
    assert found.batches == 3
    assert found.tokens == 14 + 40 + 15


def test_batches_may_be_dicts() -> None:
    model = Tokens().eval()
    data = [
        {"input_ids": ids, "attention_mask": (torch.rand(ids.shape) > 0.3).float(), "scale": 2.0} for ids in batches()
    ]
    found = qcompile.calibrate(model, data)
    check_statistics(found, model, data)
    assert set(found.example) == {"input_ids", "attention_mask", "scale"}


def test_batches_may_be_lists_of_ids_and_come_from_a_generator() -> None:
    model = Tokens().eval()

    def generate() -> Iterator[Any]:
        yield [1, 2, 3]
        yield torch.tensor([[4, 5]])

    found = qcompile.calibrate(model, generate())
    check_statistics(found, model, [{"input_ids": torch.tensor([[1, 2, 3]])}, {"input_ids": torch.tensor([[4, 5]])}])
    assert (found.batches, found.tokens) == (2, 5)


def test_a_model_may_call_its_first_input_anything() -> None:
    model, x = ReluMLP().eval(), torch.randn(6, 16)
    check_statistics(qcompile.calibrate(model, [x]), model, [{"x": x}])


def test_ignored_linears_have_no_statistics() -> None:
    model, data = Tokens().eval(), batches()
    found = qcompile.calibrate(model, data, ignore=("mlp.gate*", "lm_head"))
    assert found.statistics.keys() == {"mlp.up_proj.weight", "mlp.down_proj.weight"}
    found = qcompile.calibrate(model, data, ignore=())
    check_statistics(found, model, [{"input_ids": ids} for ids in data], without="nothing")


def test_graph_breaks_keep_full_names() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(ReluMLP() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
            return x

    model, data = Broken().eval(), [torch.randn(4, 16), torch.randn(9, 16)]
    check_statistics(qcompile.calibrate(model, data), model, [{"x": x} for x in data])


def test_tied_weights_have_one_statistic_over_all_their_inputs() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.second = nn.Linear(16, 16)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) * 100)

    model, x = Tied().eval(), torch.randn(8, 16)
    found = qcompile.calibrate(model, [x])
    read = read_by_hand(model, [{"x": x}])
    assert list(found.statistics) == ["first.weight"]
    expected = torch.maximum(read["first.weight"], read["second.weight"])
    torch.testing.assert_close(found.statistics["first.weight"].absmax, expected, rtol=1e-6, atol=0)


def test_calibrating_leaves_the_model_alone() -> None:
    model, data = Tokens().eval(), batches()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        outputs = [model(ids) for ids in data]
    qcompile.calibrate(model, data)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert all(torch.equal(model(ids), y) for ids, y in zip(data, outputs, strict=True))


def test_calibrating_twice_starts_anew() -> None:
    model, x = ReluMLP().eval(), torch.randn(6, 16)
    qcompile.calibrate(model, [x * 100 + 5])
    check_statistics(qcompile.calibrate(model, [x]), model, [{"x": x}])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_statistics_are_float32(dtype: torch.dtype) -> None:
    model = ReluMLP().eval().to(dtype)
    found = qcompile.calibrate(model, [torch.randn(4, 16, dtype=dtype)])
    assert {statistic.absmax.dtype for statistic in found.statistics.values()} == {torch.float32}
    for name, statistic in found.statistics.items():
        assert statistic.absmax.shape == (model.get_parameter(name).shape[1],)


@pytest.mark.parametrize("data", [[], (), iter([])], ids=["list", "tuple", "iterator"])
def test_no_batches_are_refused(data: Any) -> None:
    with pytest.raises(CalibrationError, match="calibration needs at least one batch; got none"):
        qcompile.calibrate(Tokens(), data)


@pytest.mark.parametrize("shape", [(1, 0), (0, 4)], ids=str)
def test_an_empty_batch_is_refused(shape: tuple[int, int]) -> None:
    data = [torch.ones(1, 4, dtype=torch.long), torch.zeros(shape, dtype=torch.long)]
    with pytest.raises(CalibrationError, match="a calibration batch must hold tokens; batch 1 has an empty tensor"):
        qcompile.calibrate(Tokens(), data)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_name_the_weight(value: float) -> None:
    model = Tokens().eval()
    with torch.no_grad():
        model.embed.weight[7, 3] = value
    qcompile.calibrate(model, [torch.tensor([[1, 2, 3]])])
    with pytest.raises(CalibrationError, match=r"the input of mlp\.(gate|up)_proj\.weight has NaN or Inf") as caught:
        qcompile.calibrate(model, [torch.tensor([[1, 7, 3]])])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [nn.LayerNorm(16), nn.Sequential(nn.ReLU(), nn.Flatten(0))])
def test_a_model_without_linears_is_refused(model: nn.Module) -> None:
    with pytest.raises(CalibrationError, match=f"{type(model).__name__} has no linear that ran and is not ignored"):
        qcompile.calibrate(model, [torch.randn(2, 16)])


def test_a_model_with_everything_ignored_is_refused() -> None:
    with pytest.raises(CalibrationError, match="has no linear that ran and is not ignored"):
        qcompile.calibrate(ReluMLP(), [torch.randn(2, 16)], ignore=("*",))


def test_the_example_is_one_short_row() -> None:
    found = qcompile.calibrate(Tokens(), [torch.ones(2, 40, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)])
    assert found.example["input_ids"].shape == (1, LONGEST)


class Switched(nn.Module):
    """A flag decides which path is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, relu: bool = False, extra: object = None) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)) if relu else torch.tanh(self.fc1(x)))


def test_plain_arguments_belong_to_the_example(tmp_path: Path) -> None:
    model = Switched().eval().requires_grad_(False)
    found = qcompile.calibrate(model, [{"x": torch.randn(2, 16), "relu": True}] * 2)
    found.save(tmp_path / "file")
    loaded = qcompile.Calibration.load(tmp_path / "file")
    for calibration in (found, loaded):
        assert calibration.example.pop("x").shape == (2, 16)
        assert (calibration.example, calibration.kinds, calibration.batches) == ({"relu": True}, 1, 2)


class Conditioned(nn.Module):
    """What diffusion models call: tensors in a dictionary, sizes in a list of tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, condition: dict[str, Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        height, width = sizes[0]
        return self.fc2(torch.relu(self.fc1(x)) + condition["gain"] * height / width)


def test_a_model_that_reads_dictionaries_and_lists_is_changed_in_place(tmp_path: Path) -> None:
    model, x = Conditioned().eval().requires_grad_(False), torch.randn(3, 16)
    call = {"x": x, "condition": {"gain": torch.randn(16)}, "sizes": [(2, 4)]}
    expected = model(**call)
    found = qcompile.calibrate(model, [call, {**call, "x": x[:1]}])
    assert found.kinds == 1
    found.save(tmp_path / "file")
    qcompile.quantize(model, qcompile.Calibration.load(tmp_path / "file"))
    assert isinstance(model.fc2, QuantizedLinear)
    assert_close("int8/model", actual=model(**call), expected=expected)


def test_kinds_of_calls_are_counted() -> None:
    model = Switched().eval().requires_grad_(False)
    x = torch.randn(2, 16)
    assert qcompile.calibrate(model, [{"x": x, "relu": True}, {"x": x, "relu": False}, {"x": x}]).kinds == 3
    assert qcompile.calibrate(model, [{"x": x}, {"x": x[:1]}]).kinds == 1
    assert qcompile.calibrate(model, [{"x": x, "extra": [1]}, {"x": x, "extra": [2]}]).kinds == 2


def test_arguments_that_no_file_can_hold_leave_no_example() -> None:
    model = Switched().eval().requires_grad_(False)
    found = qcompile.calibrate(model, [{"x": torch.randn(2, 16), "extra": [object()]}])
    assert not found.example
    with pytest.raises(CalibrationError, match="had something else among its arguments; calibrate without it"):
        qcompile.quantize(model, found)


def test_the_example_does_not_follow_a_reused_buffer() -> None:
    buffers = [torch.ones(1, 4, dtype=torch.long), torch.ones(3, 16)]
    model, other = Tokens().eval(), ReluMLP().eval()
    found = [qcompile.calibrate(model, buffers[:1]), qcompile.calibrate(other, buffers[1:])]
    for buffer, calibration in zip(buffers, found, strict=True):
        buffer.zero_()
        assert all(value.all() for value in calibration.example.values())


def test_a_calibration_of_shared_tensors_is_saved(tmp_path: Path) -> None:
    model, ids = Tokens().eval(), torch.ones(1, 4, dtype=torch.long)
    saved = qcompile.calibrate(model, [{"input_ids": ids, "attention_mask": ids}])
    saved.save(tmp_path / "file")
    assert Calibration.load(tmp_path / "file").example.keys() == saved.example.keys()


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    data = [torch.randn(2, 16)] * 2
    qcompile.calibrate(ReluMLP(), data, progress=True)
    shown = capsys.readouterr()
    assert "calibrating" in shown.err
    assert not shown.out
    qcompile.calibrate(ReluMLP(), data)
    assert capsys.readouterr().err == ""


def test_dumps_are_written_if_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(debug.VARIABLE, "dump,verify")
    qcompile.calibrate(ReluMLP(), [torch.randn(2, 16)])
    assert (tmp_path / debug.DEFAULT_FOLDER / "graph-000" / "02.insert_observers.diff").is_file()


def test_a_weight_and_its_transpose_in_two_graphs() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.head(x)
            torch._dynamo.graph_break()
            return torch.softmax(y, -1) @ self.head.weight

    with pytest.raises(CalibrationError, match=r"head.weight serves linears with 16 and 32 inputs.*list it in ignore"):
        qcompile.calibrate(Looks().eval(), [torch.randn(2, 16)])
