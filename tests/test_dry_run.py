"""Models that look at the dtype of their weights: which linears they would break, and that looking changes nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn

import qcompile
from qcompile.dry_run import must_stay_float
from qcompile.errors import ConfigError
from qcompile.quantized_linear import quantized_linears

FP8 = torch.float8_e4m3fn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))  # type: ignore[no-any-return]

    def between(self, x: Tensor) -> Tensor:
        return x


class Casts(Model):
    """As PEFT's LoRA layers do."""

    def between(self, x: Tensor) -> Tensor:
        return x.to(self.second.weight.dtype)


class CastsUnlessInt8(Model):
    """As T5's feed-forward does."""

    def between(self, x: Tensor) -> Tensor:
        return x if self.second.weight.dtype == torch.int8 else x.to(self.second.weight.dtype)


class CastsToItsOwnDtype(Model):
    """As models with a property `dtype` do: that of their first parameter which is a float."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(next(p.dtype for p in self.parameters() if p.is_floating_point())))


class CastsAndHasAHead(CastsToItsOwnDtype):
    """A linear that stays in float and reads no other dtype than its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))  # type: ignore[no-any-return]


class Checks(Model):
    def between(self, x: Tensor) -> Tensor:
        if not self.second.weight.is_floating_point():
            raise TypeError("floats, please")
        return x


class ChecksItsType(Model):
    def between(self, x: Tensor) -> Tensor:
        if not isinstance(self.second, nn.Linear):
            raise TypeError("a linear, please\nand more")
        return x


class Looks(Model):
    """At what does not matter."""

    def between(self, x: Tensor) -> Tensor:
        return x if self.second.weight.shape[0] == 16 and self.second.weight.device == x.device else x * 0


def found(model: Model, dtype: torch.dtype) -> list[str]:
    linears = {model.first: "first", model.second: "second"}
    return sorted(linears[module] for module in must_stay_float(model, linears, dtype, {"x": torch.randn(3, 16)}))


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        (Model, torch.int8, []),
        (Looks, torch.int8, []),
        (Casts, torch.int8, ["second"]),
        (Casts, FP8, ["second"]),
        (CastsUnlessInt8, torch.int8, []),
        (CastsUnlessInt8, FP8, ["second"]),
        (CastsToItsOwnDtype, torch.int8, []),
        (CastsToItsOwnDtype, FP8, ["first"]),
        (Checks, torch.int8, ["second"]),
        (Checks, FP8, []),
    ],
)
def test_what_would_read_8_bit_numbers(kind: type[Model], dtype: torch.dtype, expected: list[str]) -> None:
    assert found(kind(), dtype) == expected


@pytest.fixture(params=[Model, Casts, Checks, ChecksItsType])
def unchanged(request: pytest.FixtureRequest) -> Iterator[Model]:
    model = request.param()
    before = [(module, type(module), {**vars(module)}) for module in model.modules()]
    parameters = dict(model.named_parameters())
    yield model
    for module, kind, inside in before:
        assert type(module) is kind
        assert vars(module) == inside
    assert all(one is parameters[name] for name, one in model.named_parameters())


def test_nothing_is_left_behind(unchanged: Model) -> None:
    if isinstance(unchanged, ChecksItsType):
        with pytest.raises(ConfigError, match="with 8-bit weights in its linears; then it raises: a linear, please$"):
            found(unchanged, torch.int8)
    else:
        found(unchanged, torch.int8)


def test_without_linears_nothing_runs() -> None:
    class Never(nn.Module):
        def forward(self) -> None:
            raise AssertionError

    assert must_stay_float(Never(), [], torch.int8, {}) == set()


def test_scales_are_floats_too() -> None:
    """The first parameter that is a float is then a scale in float32, whatever the model's dtype."""
    model = CastsAndHasAHead().to(torch.bfloat16)
    call: dict[str, Any] = {"x": torch.randn(3, 16, dtype=torch.bfloat16)}
    assert must_stay_float(model, [model.first, model.second], torch.int8, call) == {model.first}
    qcompile.quantize(model, [call], ignore=("head",))
    assert set(quantized_linears(model)) == {"second"}
    assert model(**call).dtype == torch.bfloat16


def test_a_bfloat16_model_and_one_that_is_compiled() -> None:
    model = Casts().to(torch.bfloat16)

    def never(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        raise AssertionError("compiled")

    model.compile(backend=never)
    call: dict[str, Any] = {"x": torch.randn(3, 16, dtype=torch.bfloat16)}
    assert must_stay_float(model, [model.first, model.second], torch.int8, call) == {model.second}


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("kind", [Casts, CastsUnlessInt8, CastsToItsOwnDtype])
def test_quantize_leaves_them_in_float(kind: type[Model], dtype: Any) -> None:
    model, x = kind().eval(), torch.randn(5, 16)
    with torch.no_grad():
        expected = model(x)
        qcompile.quantize(model, [x], dtype=dtype)
        assert_close(f"{dtype}/model", actual=model(x), expected=expected)
    kept = {"first", "second"} - set(quantized_linears(model))
    assert {*model.qcompile_record.kept.values()} == (  # type: ignore[union-attr]
        {"the model's code depends on the dtype of its weight"} if kept else set()
    )
    assert len(kept) == (0 if dtype == "int8" and kind is not Casts else 1)


class Output(Model):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(self.second.weight.dtype)


class Rounds(Model):
    def between(self, x: Tensor) -> Tensor:
        return x.to(self.first.weight.dtype).to(x.dtype)


class AsksForTheClass(Model):
    def between(self, x: Tensor) -> Tensor:
        return x.flip(-1) if isinstance(self.second, nn.Linear) else x


class AsksForFloats(Model):
    def between(self, x: Tensor) -> Tensor:
        return x.flip(-1) if self.second.weight.is_floating_point() else x


@pytest.mark.parametrize(
    ("kind", "kept"), [(Output, "second"), (Rounds, "first"), (AsksForTheClass, "second"), (AsksForFloats, "second")]
)
def test_linears_on_which_the_result_depends_stay_in_float(kind: type[Model], kept: str) -> None:
    model, x = kind().eval(), torch.randn(4, 16)
    with torch.no_grad():
        expected = model(x)
        qcompile.quantize(model, [x])
        assert quantized_linears(model).keys() == {"first", "second"} - {kept}
        assert_close("int8/model", actual=model(x), expected=expected)


def test_random_numbers_are_the_same_in_every_run() -> None:
    class Noisy(Model):
        def between(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    model = Noisy().eval()
    assert must_stay_float(model, [model.first, model.second], torch.int8, {"x": torch.randn(4, 16)}) == set()


def test_a_model_that_changes_from_call_to_call() -> None:
    class Counts(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def between(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x + self.calls

    model = Counts().eval()
    assert must_stay_float(model, [model.first, model.second], torch.int8, {"x": torch.randn(4, 16)}) == set()
