"""Which linears get a place in 8 bits: those whose float weight nothing else needs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import BrokenUp
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import qcompile
from qcompile.placement import is_plain_linear
from qcompile.quantized_linear import quantized_linears


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x)
    return y


class Spelled(nn.Linear):
    """A linear in another spelling, as Falcon's."""

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias


class InFloat32(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(x.float(), self.weight.float(), bias).to(x.dtype)


def varied(change: Callable[[nn.Linear, Tensor], object]) -> type[nn.Linear]:
    """A linear whose forward is `change`."""

    class Varied(nn.Linear):
        def forward(self, x: Tensor) -> object:
            return change(self, x)

    return Varied


def plain(module: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, module.weight, module.bias)


class WithChild(Spelled):
    def __init__(self) -> None:
        super().__init__(16, 24)
        self.adapter = nn.Linear(16, 24)


class WithMore(Spelled):
    def __init__(self) -> None:
        super().__init__(16, 24)
        self.gain = nn.Parameter(torch.ones(24))


class TakesMore(nn.Linear):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return plain(self, x) if scale is None else plain(self, x) * scale


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Spelled, InFloat32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_spellings_of_a_linear_are_linears(kind: type[nn.Linear], bias: bool, dtype: torch.dtype) -> None:
    assert is_plain_linear(kind(16, 24, bias=bias).to(dtype))


@pytest.mark.parametrize(
    "module",
    [
        varied(lambda m, x: plain(m, x) * 1.001)(16, 24),
        varied(lambda m, x: plain(m, x) + 1e-3)(16, 24),
        varied(lambda m, x: plain(m, x.clamp(-100, 100)))(16, 24),
        varied(lambda m, x: nn.functional.hardshrink(plain(m, x), 1e-5))(16, 24, bias=False),
        varied(lambda m, x: nn.functional.linear(x, m.weight))(16, 24),
        varied(lambda m, x: (plain(m, x), None))(16, 24),
        varied(lambda m, x: plain(m, x).transpose(-1, -2))(16, 24),
        varied(lambda m, x: plain(m, x).sum(0))(16, 24),
        varied(lambda m, x: plain(m, x.view(2, 4, 16)))(16, 24),
        WithChild(), WithMore(), TakesMore(16, 24), nn.Bilinear(16, 16, 24), nn.Embedding(16, 16),
    ],
)  # fmt: skip
def test_what_only_resembles_a_linear_is_none(module: nn.Module) -> None:
    assert not is_plain_linear(module)


def test_a_subclass_that_computes_a_linear_is_quantized() -> None:
    model = nn.Sequential(Spelled(16, 24), nn.ReLU(), varied(lambda m, x: plain(m, x).abs())(24, 16)).eval()
    x = torch.randn(4, 16)
    expected = run(model, x)
    qcompile.quantize(model, [x])
    assert [type(module).__name__ for module in model] == ["QuantizedLinear", "ReLU", "Varied"]
    assert "not read by an nn.Linear or Conv1D of its own" in model.qcompile_record.kept["2"]
    assert_close("int8/model", actual=run(model, x), expected=expected)


class TwoTowers(nn.Module):
    """A second input has linears of its own, one of which computes what nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other, self.unread = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        if extra is None:
            return self.fc(x)
        h = self.other(extra)
        self.unread(h)
        return self.fc(x) + h


def test_linears_that_the_example_does_not_reach_stay_in_float() -> None:
    x, calls = torch.randn(4, 16), [{"x": torch.randn(4, 16), "extra": torch.randn(4, 16)}, {"x": torch.randn(4, 16)}]
    for example, quantized_ones in ((calls[0], {"fc", "other"}), (calls[1], {"fc"}), (x, {"fc"})):
        model = TwoTowers().eval()
        expected = run(model, x)
        qcompile.quantize(model, calls, example=example)
        assert quantized_linears(model).keys() == quantized_ones
        why = "nothing that the example call returns depends on it"
        assert model.qcompile_record.kept == dict.fromkeys({"fc", "other", "unread"} - quantized_ones, why)
        assert_close("int8/model", actual=run(model, x), expected=expected)


def test_a_parametrized_linear_is_not_told_to_be_unread() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval(), torch.randn(4, 16)
    nn.utils.parametrizations.weight_norm(model[2])
    qcompile.quantize(model, [x])
    assert quantized_linears(model).keys() == {"0"}
    assert not any("nothing that the example" in reason for reason in model.qcompile_record.kept.values())


def test_probing_calls_no_hook_of_the_users() -> None:
    model, seen = nn.Sequential(Spelled(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval(), []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].dtype))
    qcompile.quantize(model, [torch.randn(4, 16)])
    assert set(seen) <= {torch.float32}
    assert model.qcompile_record.kept == {"0": "its module has forward hooks"}


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 16), nn.Linear(16, 16)


READS: dict[str, tuple[Callable[[nn.Linear, Tensor], Tensor], str]] = {
    "rows": (lambda fc, h: h + fc.weight[: len(h)], "read by add"),
    "statistics": (lambda fc, h: h * fc.weight.abs().mean(), "read by mul"),
    "casts": (lambda fc, h: h * fc.weight.to(torch.float64).mean().float(), "read by mul"),
    "a table": (lambda fc, h: h + F.embedding(torch.arange(len(h)), fc.weight), "read by add"),
    "another linear": (lambda fc, h: F.linear(h, fc.weight), "not read by an nn.Linear or Conv1D of its own"),
    "transposed": (lambda fc, h: h @ fc.weight, "not read by an nn.Linear or Conv1D of its own"),
    "its input": (lambda fc, h: F.linear(fc.weight, h).T[:, :16], "not read by an nn.Linear or Conv1D of its own"),
}  # fmt: skip


class Reads(TwoLinears):
    """What a linear computes, and something that is made from its weight by other code."""

    def __init__(self, read: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self._read = read

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.relu(self._read(self.fc, self.fc(x))))
        return y


@pytest.mark.parametrize("case", READS)
def test_a_weight_that_is_read_otherwise_stays_in_float(case: str) -> None:
    read, reason = READS[case]
    model, x = Reads(read).eval(), torch.randn(4, 16)
    expected = run(model, x)
    qcompile.quantize(model, [x])
    assert quantized_linears(model).keys() == {"out"}
    assert reason in model.qcompile_record.kept["fc"]
    assert_close("int8/model", actual=run(model, x), expected=expected)


def test_a_linear_that_also_chooses_stays_in_float() -> None:
    class Chooses(TwoLinears):
        """Once its outputs go on, once the largest of them are picked."""

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            return self.out(h.gather(-1, self.fc(torch.tanh(h)).topk(16).indices))

    model, x = Chooses().eval(), torch.randn(4, 16)
    qcompile.quantize(model, [x])
    assert quantized_linears(model).keys() == {"out"}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(24, 16), nn.Linear(16, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.embed(ids)))
        return y


def test_an_embedding_that_a_head_is_tied_to_keeps_its_float_weight() -> None:
    model, ids = Tied().eval(), torch.randint(0, 24, (2, 5))
    expected = run(model, ids)
    qcompile.quantize(model, [ids], ignore=())
    assert quantized_linears(model).keys() == {"head"}
    assert model.embed.weight.dtype == torch.float32
    assert_close("int8/model", actual=run(model, ids), expected=expected)


def test_a_weight_that_code_between_graphs_reads_stays_in_float() -> None:
    model, x = BrokenUp(between=lambda model: model.second.fc2.weight.mean(1)).eval(), torch.randn(4, 16)
    expected = run(model, x)
    qcompile.quantize(model, [x])
    assert quantized_linears(model).keys() == {"first.fc1", "first.fc2", "second.fc1"}
    assert model.qcompile_record.kept == {"second.fc2": "its weight is also read by code outside of graphs"}
    assert_close("int8/model", actual=run(model, x), expected=expected)


@pytest.mark.parametrize(
    "after",
    [
        lambda model, h: h + model.first.fc1.weight[:4],
        lambda model, h: h + model.first.fc1.weight.float()[:4],
        lambda model, h: h + F.linear(h, model.first.fc1.weight)[:, :16],
    ],
    ids=["rows", "cast rows", "a linear"],
)
def test_a_weight_that_another_graph_reads_otherwise_stays_in_float(after: Callable[[Any, Tensor], Tensor]) -> None:
    model, x = BrokenUp(after=after).eval(), torch.randn(4, 16)
    expected = run(model, x)
    qcompile.quantize(model, [x])
    assert quantized_linears(model).keys() == {"first.fc2", "second.fc1", "second.fc2"}
    assert "its weight is " in model.qcompile_record.kept["first.fc1"]
    assert_close("int8/model", actual=run(model, x), expected=expected)


class Hands(TwoLinears):
    """A weight goes into the next graph under no name."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self._view = view

    def forward(self, x: Tensor) -> Tensor:
        weight, h = self.fc.weight.T if self._view else self.fc.weight, self.fc(x)
        torch._dynamo.graph_break()
        return self.out(torch.relu(F.linear(h, weight)))


@pytest.mark.parametrize("view", [False, True])
def test_a_weight_that_is_handed_from_graph_to_graph_stays_in_float(view: bool) -> None:
    model, x = Hands(view).eval(), torch.randn(4, 16)
    expected = run(model, x)
    qcompile.quantize(model, [x])
    assert quantized_linears(model).keys() == {"out"}
    assert_close("int8/model", actual=run(model, x), expected=expected)


def test_what_no_graph_reads_is_said() -> None:
    class Outside(BrokenUp):
        @torch.compiler.disable
        def uncompiled(self, x: Tensor) -> Tensor:
            return self.second.fc2(self.second.fc1(x))

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.uncompiled(self.first(x)))

    model, x = Outside().eval(), torch.randn(4, 16)
    qcompile.quantize(model, [x])
    reason = "no graph of the example call reads it"
    assert model.qcompile_record.kept == {"second.fc1": reason, "second.fc2": reason}


def test_a_linear_of_zeros_reads_its_weight_as_any_other() -> None:
    class Delayed(TwoLinears):
        """As Zaya's values: the first token's are those of a token before it, of zeros."""

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([self.fc(x.new_zeros(1, 16)), self.fc(x)[:-1]])
            y: Tensor = self.out(torch.relu(h))
            return y

    model, x = Delayed().eval(), torch.randn(4, 16)
    expected = run(model, x)
    qcompile.quantize(model, [x])
    assert quantized_linears(model).keys() == {"fc", "out"}
    assert_close("int8/model", actual=run(model, x), expected=expected)


class CalledTwice(nn.Linear):
    def __call__(self, *inputs: Tensor) -> Tensor:
        return 2 * super().__call__(*inputs)


def with_buffer() -> nn.Linear:
    linear = nn.Linear(16, 24)
    linear.register_buffer("shift", torch.ones(24))
    return linear


@pytest.mark.parametrize("module", [CalledTwice(16, 24), with_buffer()], ids=["call", "buffer"])
def test_what_does_or_holds_more_is_no_plain_linear(module: nn.Module) -> None:
    assert not is_plain_linear(module)


class CallsAfterABreak(TwoLinears):
    """Has looked the linear up before the break, and calls it first thing after; or multiplies by its weight itself."""

    def __init__(self, *, itself: bool) -> None:
        super().__init__()
        self._itself = itself

    @torch.compiler.disable
    def uncompiled(self, x: Tensor) -> Tensor:
        return x.abs()

    def forward(self, x: Tensor) -> Tensor:
        if self._itself:
            return F.linear(self.uncompiled(torch.relu(self.fc(x))), self.out.weight, self.out.bias)
        y: Tensor = self.out(self.uncompiled(torch.relu(self.fc(x))))
        return y


@pytest.mark.parametrize("itself", [False, True])
def test_a_linear_that_is_called_first_after_a_break(itself: bool) -> None:
    model, x = CallsAfterABreak(itself=itself).eval(), torch.randn(4, 16)
    expected = run(model, x)
    qcompile.quantize(model, [x])
    assert quantized_linears(model).keys() == ({"fc"} if itself else {"fc", "out"})
    assert_close("int8/model", actual=run(model, x), expected=expected)


def test_a_weight_that_only_goes_into_products_under_no_name() -> None:
    """As PEFT's DoRA hands the weight that it adapts."""

    class HandsOnly(Hands):
        def forward(self, x: Tensor) -> Tensor:
            weight, h = self.fc.weight, torch.tanh(x)
            torch._dynamo.graph_break()
            y: Tensor = self.out(torch.relu(F.linear(h, weight)))
            return y

    model, x = HandsOnly(view=False).eval(), torch.randn(4, 16)
    expected = run(model, x)
    qcompile.quantize(model, [x])
    assert quantized_linears(model).keys() == {"out"}
    assert model.qcompile_record.kept == {"fc": "its weight goes into no linear, or under no name"}
    assert_close("int8/model", actual=run(model, x), expected=expected)
