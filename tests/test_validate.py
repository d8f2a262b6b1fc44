"""Translation validation: a pass that changes numbers is named at the first call; honest passes are not accused."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import compiled
from graphs import Attention, GatedMLP, ReluMLP, captured
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from qcompile import ops, passes
from qcompile.captured import Captured
from qcompile.config import Config
from qcompile.errors import VerifyError
from qcompile.pass_pipeline import Pass, PassResult, Pipeline
from qcompile.rewrite import Rewriter, copy_graph
from qcompile.validate import Checked, Validate, graph_inputs, relative_error

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Sabotaged:
    """A pass whose work is spoilt afterwards."""

    honest: Pass = dataclasses.field(repr=False)
    spoil: Callable[[GraphModule], None]

    @property
    def name(self) -> str:
        return self.honest.name

    @property
    def stage(self) -> str:
        return self.honest.stage

    @property
    def bound(self) -> Any:
        return self.honest.bound

    def run(self, gm: GraphModule) -> PassResult:
        result = self.honest.run(gm)
        self.spoil(gm)
        return result


def products(gm: GraphModule, target: Any) -> list[Node]:
    return list(gm.graph.find_nodes(op="call_function", target=target))


def set_argument(node: Node, index: int, value: Any) -> None:
    node.args = (*node.args[:index], value, *node.args[index + 1 :])


def emit(gm: GraphModule, target: Any, *args: Any, before: Node) -> Node:
    return Rewriter(gm, "sabotage").emit(target, args, before=before, of=before, name="spoilt")


def drop_bias(gm: GraphModule) -> None:
    for node in products(gm, aten.linear.default)[:1]:
        node.args = node.args[:2]


def drop_product_bias(gm: GraphModule) -> None:
    set_argument(products(gm, ops.scaled_mm)[0], 4, None)


def scale_weight(gm: GraphModule) -> None:
    linear = products(gm, aten.linear.default)[-1]
    set_argument(linear, 1, emit(gm, aten.mul.Tensor, linear.args[1], 1.01, before=linear))


def scale_quantized_weight(gm: GraphModule) -> None:
    """The weight is 1.01 of what it should be before it is quantized: quantization itself is faultless."""
    quantize = next(n for n in products(gm, ops.quantize) if n.name.startswith("weight"))
    set_argument(quantize, 0, emit(gm, aten.mul.Tensor, quantize.args[0], 1.01, before=quantize))


def reverse_scales(gm: GraphModule) -> None:
    product = products(gm, ops.scaled_mm)[-1]
    set_argument(product, 3, emit(gm, aten.flip.default, product.args[3], [0], before=product))


def double_scale(gm: GraphModule) -> None:
    product = products(gm, ops.scaled_mm)[0]
    set_argument(product, 3, emit(gm, aten.mul.Tensor, product.args[3], 2.0, before=product))


def double_input_scale(gm: GraphModule) -> None:
    product = products(gm, ops.scaled_mm)[0]
    set_argument(product, 2, emit(gm, aten.mul.Tensor, product.args[2], 2.0, before=product))


def slightly_wrong_scale(gm: GraphModule) -> None:
    product = products(gm, ops.scaled_mm)[0]
    set_argument(product, 3, emit(gm, aten.mul.Tensor, product.args[3], 1.1, before=product))


def swap_siblings(gm: GraphModule) -> None:
    """q gets the weights of k: each product is faultless, and none is the one asked for."""
    one, two = products(gm, ops.scaled_mm)[:2]
    two.prepend(one)
    for index in (1, 3, 4):
        left, right = one.args[index], two.args[index]
        set_argument(one, index, right)
        set_argument(two, index, left)


def drop_activation(gm: GraphModule) -> None:
    for product in products(gm, ops.scaled_mm):
        set_argument(product, 6, None)


def drop_residual(gm: GraphModule) -> None:
    for product in products(gm, ops.scaled_mm):
        set_argument(product, 5, None)


def double_norm(gm: GraphModule) -> None:
    """Not a linear at all: an exact pass and the quantizing one must leave everything else alone."""
    node = products(gm, aten.mul.Tensor)[0]
    set_argument(node, 1, emit(gm, aten.mul.Tensor, node.args[1], 2.0, before=node))


class Square(nn.Module):
    """Two siblings of one shape with biases, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.one(h) * torch.sigmoid(self.two(h)) + self.two(x)


SABOTAGE: list[tuple[str, Callable[[GraphModule], None], type[nn.Module]]] = [
    ("canonicalize", drop_bias, ReluMLP),
    ("canonicalize", scale_weight, ReluMLP),
    ("canonicalize", double_norm, GatedMLP),
    ("smooth", drop_bias, ReluMLP),
    ("smooth", scale_weight, ReluMLP),
    ("quantize_linears", drop_product_bias, ReluMLP),
    ("quantize_linears", scale_quantized_weight, ReluMLP),
    ("quantize_linears", reverse_scales, ReluMLP),
    ("quantize_linears", double_scale, ReluMLP),
    ("quantize_linears", double_input_scale, ReluMLP),
    ("quantize_linears", slightly_wrong_scale, ReluMLP),
    ("quantize_linears", swap_siblings, Square),
    ("quantize_linears", double_norm, GatedMLP),
    ("share_quantize", drop_product_bias, Square),
    ("merge_siblings", reverse_scales, Square),
    ("merge_siblings", double_scale, Square),
    ("fuse_epilogues", drop_activation, ReluMLP),
    ("fuse_epilogues", drop_residual, GatedMLP),
]


@pytest.mark.parametrize(("name", "spoil", "kind"), SABOTAGE, ids=lambda value: getattr(value, "__name__", value))
def test_a_sabotaged_pass_is_named_at_the_first_call(
    name: str, spoil: Callable[[GraphModule], None], kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = passes.quantizing

    def quantizing(config: Config) -> Pipeline:
        steps = honest(config).passes
        assert name in [step.name for step in steps]
        return Pipeline(tuple(Sabotaged(step, spoil) if step.name == name else step for step in steps))

    monkeypatch.setattr(passes, "quantizing", quantizing)
    model, x = kind().requires_grad_(False), torch.randn(4, 16)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5)
    call = compiled(model, calibrate=1, verify=True)
    call(x)
    with pytest.raises(VerifyError, match=f"pass {name}") as caught:
        call(x)
    assert "\n" not in str(caught.value)


def steps(graph: Captured, config: Config) -> Validate:
    validate = Validate()
    passes.quantizing(config).run(graph.graph, [validate])
    return validate


def recorded(graph: Captured, config: Config) -> Callable[[Tensor, str, str], Tensor]:
    """Statistics of the very inputs that are validated."""
    observed, _ = passes.observing(config).run(graph.graph)
    with torch.no_grad():
        results = observed(*graph.args)
    indices = observed.meta["observed"]
    observations = results[len(results) - 2 * len(indices) :]
    by_id = {
        (id(graph.args[i]), field): value
        for siblings, pair in zip(indices, zip(observations[::2], observations[1::2], strict=True), strict=True)
        for i in siblings
        for field, value in zip(("absmax", "rows"), pair, strict=True)
    }
    return lambda weight, name, field: by_id[id(weight), field]


@pytest.mark.parametrize("kind", [Attention, Square])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [
    {}, {"activations": "tensor"}, {"activations": "static"}, {"dtype": "fp8"}, {"dtype": "fp8_e5m2", "alpha": 0.9},
], ids=str)  # fmt: skip
def test_honest_passes_stay_within_their_bounds(
    kind: type[nn.Module], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    graph = GRAPHS.setdefault((kind, dtype), fresh(kind, dtype))
    config = Config(calibrate=1, **options)
    checked = steps(graph, config).check(graph.args, recorded(graph, config))
    assert next(result.step.partition("{")[0] for result in checked) == "canonicalize"
    assert any(result.step.startswith("quantize_linears") for result in checked)
    assert all(0 <= result.error <= result.limit for result in checked)


GRAPHS: dict[Any, Captured] = {}


def fresh(kind: type[nn.Module], dtype: torch.dtype) -> Captured:
    return captured(kind().to(dtype), torch.randn(2, 5, 16, dtype=dtype))


@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.75), ("fp8", 0.35), ("fp8_e5m2", 0.35)])
def test_the_bound_of_quantization_is_not_vacuous(dtype: Any, share: float) -> None:
    """With two channels and many rows some product comes near it: errors twice as large would leave it."""
    graph = captured(nn.Sequential(nn.Linear(2, 64)), torch.randn(512, 2))
    checked = steps(graph, Config(dtype=dtype)).check(graph.args, lambda weight, name, field: weight)
    (error,) = [result.error for result in checked if result.step.startswith("quantize_linears")]
    assert share < error <= 1


def test_sqnr_is_that_of_every_quantized_linear() -> None:
    model = Square().eval().requires_grad_(False)
    graph, config = captured(model, x := torch.randn(64, 16)), Config(calibrate=1, alpha=None)
    checked = steps(graph, config).check(graph.args, recorded(graph, config))
    found = {name: value for result in checked for name, value in result.sqnr.items()}
    assert set(found) == {"one", "two"}
    h = model.norm(x)
    x_q, x_scale = ops.quantize(h, [], "row", torch.int8)
    w_q, w_scale = ops.quantize(model.one.weight, [], "row", torch.int8)
    actual = ops.scaled_mm(x_q, w_q, x_scale, w_scale, model.one.bias, None, None, torch.float32)
    noise = (actual - model.one(h)).square().sum()
    assert found["one"] == pytest.approx(float(10 * torch.log10(model.one(h).square().sum() / noise)), abs=0.01)


def test_a_pass_that_fails_does_not_end_the_outcomes() -> None:
    graph, config = captured(ReluMLP(), torch.randn(4, 16)), Config(calibrate=1)
    validate = Validate()
    spoilt = [Sabotaged(s, scale_weight) if s.name == "smooth" else s for s in passes.quantizing(config).passes]
    Pipeline(tuple(spoilt)).run(graph.graph, [validate])
    outcomes = {text.partition("{")[0]: found for text, found in validate.outcomes(graph.args, recorded(graph, config))}
    assert isinstance(outcomes["smooth"], VerifyError)
    assert isinstance(outcomes["canonicalize"], Checked)
    assert isinstance(outcomes["quantize_linears"], Checked)


def test_values_beyond_a_static_range_are_charged_to_saturation() -> None:
    graph = captured(ReluMLP(), torch.randn(8, 16) * 100)
    config = Config(calibrate=1, activations="static", alpha=None)
    steps(graph, config).check(graph.args, lambda weight, name, field: torch.ones(weight.shape[1]))


def test_arguments_are_left_alone() -> None:
    graph = captured(ReluMLP(), torch.randn(8, 16))
    before = [arg.clone() for arg in graph.args]
    steps(graph, Config()).check(graph.args, lambda weight, name, field: weight)
    assert all(torch.equal(a, b) for a, b in zip(graph.args, before, strict=True))


class Cached(nn.Module):
    """Writes what a linear computes into a cache that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        cache[1:2] = x[:1] * 3
        return self.fc(x) + cache.sum(0)


@pytest.mark.parametrize("name", ["canonicalize", "quantize_linears", "eliminate_dead"])
def test_a_lost_write_is_named(name: str) -> None:
    def spoil(gm: GraphModule) -> None:
        (write,) = products(gm, aten.copy_.default)
        gm.graph.erase_node(write)

    cache = torch.zeros(3, 16)
    graph = captured(Cached(), torch.randn(4, 16), cache)
    cache.zero_()
    honest = passes.quantizing(Config()).passes
    spoilt = Pipeline(tuple(Sabotaged(step, spoil) if step.name == name else step for step in honest))
    validate = Validate()
    spoilt.run(graph.graph, [validate])
    with pytest.raises(VerifyError, match=f"pass {name}.* must"):
        validate.check(graph.args, lambda weight, name, field: weight)
    steps(graph, Config()).check(graph.args, lambda weight, name, field: weight)


def test_caches_are_not_written_by_the_check() -> None:
    cache = torch.zeros(3, 16)
    graph = captured(Cached(), torch.randn(4, 16), cache)
    cache.zero_()
    steps(graph, Config()).check(graph.args, lambda weight, name, field: weight)
    assert not cache.any()


def test_verification_happens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[list[Checked]] = []
    original = Validate.check

    def check(self: Validate, *args: Any) -> list[Checked]:
        checks.append(original(self, *args))
        return checks[-1]

    monkeypatch.setattr(Validate, "check", check)
    model = ReluMLP()
    call = compiled(model, verify=True)
    with torch.no_grad():
        for _ in range(3):
            call(torch.randn(4, 16))
    assert len(checks) == 1
    assert checks[0]


def test_graph_inputs_are_fresh_where_a_graph_may_write() -> None:
    graph = captured(ReluMLP(), torch.randn(4, 16))
    inputs = graph_inputs(graph.graph, graph.args, lambda weight, name, field: weight)
    shared = [a is b for a, b in zip(inputs, graph.args, strict=True)]
    assert shared.count(False) == 1
    with torch.no_grad():
        assert torch.equal(Interpreter(copy_graph(graph.graph)).run(*inputs)[0], graph.graph(*graph.args)[0])


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0),
        ([1.0, 2.2], [1.0, 2.0], 0.2 / 5**0.5),
        ([-torch.inf, 2.0], [-torch.inf, 2.0], 0),
        ([torch.nan, 2.0], [torch.nan, 2.0], 0),
        ([0.0, 0.0], [0.0, 0.0], 0),
        ([torch.inf, 2.0], [1.0, 2.0], torch.inf),
        ([1.0, 2.0], [torch.inf, 2.0], torch.inf),
        ([torch.inf, 2.0], [-torch.inf, 2.0], torch.inf),
        ([], [], 0),
    ],
)
def test_relative_error(actual: list[float], expected: list[float], error: float) -> None:
    assert relative_error(torch.tensor(actual), torch.tensor(expected)) == pytest.approx(error, rel=1e-6)


def test_nan_is_never_within_a_limit() -> None:
    assert not relative_error(torch.tensor([torch.nan]), torch.tensor([1.0])) <= 1e9
