"""Whatever decides how a graph is compiled changes its key, and nothing else does."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graphs import GatedMLP
from torch import Tensor, nn
from torch.fx import GraphModule

from qcompile.capture import look
from qcompile.saved_graph import key as keys
from qcompile.saved_graph.key import NoKey, key_of


def dynamo_graph(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> tuple[GraphModule, list[Any]]:
    """What Dynamo hands to a backend."""
    found: list[tuple[GraphModule, list[Any]]] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append((gm, list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic)(*args)
    return found[0]


def key(model: Callable[..., Any], *args: Any, facts: Any = (), settings: Any = (), dynamic: bool = False) -> str:
    gm, inputs = dynamo_graph(model, *args, dynamic=dynamic)
    records, _ = look(gm, inputs)
    return key_of(gm, inputs, records, dict(facts), list(settings))


X = torch.ones(2, 5, 16)


def test_weights_do_not_matter_and_everything_is_deterministic() -> None:
    model = GatedMLP()
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(2)
    assert key(model, X) == key(other, X) == key(model, X + 1)


class Scaled(nn.Module):
    def __init__(self, factor: float, constant: float = 1.0) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(16, 16), factor
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * self.factor + torch.tensor(self.constant)
        return y


def sized(outputs: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Linear(16, outputs).to(dtype)


CHANGES: dict[str, tuple[Callable[[], str], Callable[[], str]]] = {
    "a Python number": (lambda: key(Scaled(2.0), X), lambda: key(Scaled(2.5), X)),
    "a constant": (lambda: key(Scaled(2.0, 1.0), X), lambda: key(Scaled(2.0, 3.0), X)),
    "a size": (lambda: key(sized(16), X), lambda: key(sized(17), X)),
    "the number of tokens": (lambda: key(sized(16), X), lambda: key(sized(16), X[:1])),
    "a dtype": (lambda: key(sized(16), X), lambda: key(sized(16, torch.float64), X.double())),
    "a layout": (
        lambda: key(sized(16), torch.ones(2, 16, 16)),
        lambda: key(sized(16), torch.ones(2, 16, 16).transpose(1, 2)),
    ),
    "a function": (lambda: key(lambda x: x.sin() @ x.mT, X), lambda: key(lambda x: x.cos() @ x.mT, X)),
    "a torch function": (lambda: key(torch.nn.functional.gelu, X), lambda: key(torch.nn.functional.silu, X)),
    "an output": (lambda: key(lambda x: (x + 1, x + 2), X), lambda: key(lambda x: (x + 2, x + 1), X)),
    "shared memory": (
        lambda: key(lambda x, y: x + y, X, torch.ones(2, 5, 16)),
        lambda: key(lambda x, y: x + y, *torch.ones(2, 2, 5, 16).unbind()),
    ),
    "frozen parameters": (lambda: key(sized(16), X), lambda: key(sized(16).requires_grad_(False), X)),
    "a fact": (lambda: key(sized(16), X), lambda: key(sized(16), X, facts={"whole_model": True})),
    "a setting": (lambda: key(sized(16), X, settings=[1]), lambda: key(sized(16), X, settings=[2])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_graph_changes_the_key(change: str) -> None:
    before, after = CHANGES[change]
    assert before() == before()
    assert before() != after()


def test_names_of_parameters_matter() -> None:
    """Patterns of linears to ignore go by them, and so do messages."""

    def named(name: str) -> nn.Module:
        model = nn.Module()
        model.add_module(name, nn.Linear(16, 16))
        model.forward = lambda x: model.get_submodule(name)(x)  # type: ignore[method-assign]
        return model

    assert key(named("first"), X) != key(named("second"), X)


class Tied(nn.Module):
    """Two linears of one parameter, of which the second product is written in one or the other."""

    def __init__(self, second: str) -> None:
        super().__init__()
        self.a, self.b, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False), second
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.get_submodule(self.second)(self.a(x).relu())
        return y


def test_the_module_that_a_product_is_written_in_matters() -> None:
    """It tells tied linears apart, and patterns of linears to ignore go by it."""
    assert key(Tied("a"), X) == key(Tied("a"), X) != key(Tied("b"), X)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def precision_of_a_backend() -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": default_dtype,
    "matmul precision": precision,
    "matmul precision of a backend": precision_of_a_backend,
    "deterministic": deterministic,
    "attention": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    "inductor": lambda: torch._inductor.config.patch(fallback_random=True),
    "functorch": lambda: torch._functorch.config.patch(functionalize_rng_ops=True),
}


@pytest.mark.parametrize("state", STATES)
def test_a_setting_of_torch_changes_the_key(state: str) -> None:
    gm, inputs = dynamo_graph(sized(16), X)
    with torch.no_grad():
        before = key_of(gm, inputs, [], {}, [])
        with STATES[state]():
            assert key_of(gm, inputs, [], {}, []) != before
        assert key_of(gm, inputs, [], {}, []) == before


def test_the_sources_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import qcompile.passes

    keys._versions.cache_clear()
    before = keys._versions()
    (tmp_path / "more.py").write_text("pass")
    monkeypatch.setattr(qcompile.passes, "__path__", [*qcompile.passes.__path__, str(tmp_path)])
    keys._versions.cache_clear()
    assert keys._versions() != before
    monkeypatch.undo()
    keys._versions.cache_clear()
    assert keys._versions() == before


@torch.library.custom_op("qcompile_test_key::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch._dynamo.allow_in_graph
def outside(x: Tensor) -> Tensor:
    return x + 1


NO_KEY: dict[str, tuple[Callable[[], str], str]] = {
    "an operator of the user's": (lambda: key(lambda x: twice(x) + 1, X), "whose meaning no version decides"),
    "a function outside torch": (lambda: key(lambda x: outside(x) * 2, X), "which torch does not have"),
    "symbolic sizes": (lambda: key(sized(16), X, dynamic=True), "takes a SymInt|symbolic sizes"),
}


@pytest.mark.parametrize("case", NO_KEY)
def test_what_no_text_says_all_about_has_no_key(case: str) -> None:
    function, reason = NO_KEY[case]
    with pytest.raises(NoKey, match=reason):
        function()
