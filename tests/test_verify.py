"""The verifier has a message for every way in which a pass can leave a graph broken."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from compiling import compiled
from graphs import Attention, GatedMLP, ReluMLP, captured
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qcompile import ops, passes
from qcompile.config import Config
from qcompile.errors import PassError, VerifyError
from qcompile.grouped_ops import grouped_linear, scaled_grouped_mm
from qcompile.pass_pipeline import PassResult, Pipeline
from qcompile.passes import Canonicalize, FindLinears, InsertObservers, QuantizeLinears
from qcompile.rewrite import Input, Rewriter, copy_graph, input_of, output_of
from qcompile.verify import Verify

aten = torch.ops.aten


class Both(nn.Module):
    """Two outputs, one of them an input as it came; a bias, a buffer that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.register_buffer("seen", torch.zeros(3, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.copy_(x)
        return torch.relu(self.fc(x)) * 2, x.view(4, 12)


def graph() -> GraphModule:
    return captured(Both(), torch.randn(3, 16)).graph


def first(gm: GraphModule, target: Any) -> Node:
    return next(iter(gm.graph.find_nodes(op="call_function", target=target)))


def placeholder(gm: GraphModule, kind: str) -> Node:
    return next(n for n in gm.graph.find_nodes(op="placeholder") if input_of(n).kind == kind)


def set_output(gm: GraphModule, index: int, node: Any) -> None:
    results = list(output_of(gm.graph).args[0])  # type: ignore[arg-type]
    results[index] = node
    output_of(gm.graph).args = (tuple(results),)


def emit(gm: GraphModule, target: Any, *args: Any, before: Node | None = None) -> Node:
    end = before or output_of(gm.graph)
    return Rewriter(gm, "test").emit(target, args, before=end, of=end, name="new")


def checked(
    gm: GraphModule, edit: Callable[[GraphModule], None], *, stage: str = "captured", full: bool = True
) -> None:
    verify = Verify(full)
    verify.start(gm)
    edited = copy_graph(gm)
    edit(edited)
    verify.stage = stage
    verify.check(edited)


def missing_value(gm: GraphModule) -> None:
    del first(gm, aten.relu.default).meta["val"]


def missing_value_of_an_input(gm: GraphModule) -> None:
    del placeholder(gm, "parameter").meta["val"]


def wrong_shape(gm: GraphModule) -> None:
    relu = first(gm, aten.relu.default)
    relu.meta["val"] = relu.meta["val"].new_empty(16, 3)


def wrong_dtype(gm: GraphModule) -> None:
    relu = first(gm, aten.relu.default)
    relu.meta["val"] = relu.meta["val"].double()


def arguments_that_do_not_fit(gm: GraphModule) -> None:
    product = first(gm, aten.addmm.default)
    product.args = (product.args[0], product.args[2], product.args[1])


def foreign_write(gm: GraphModule) -> None:
    emit(gm, aten.add_.Tensor, first(gm, aten.relu.default), 1)


def write_into_a_value(gm: GraphModule) -> None:
    relu = first(gm, aten.relu.default)
    emit(gm, aten.copy_.default, relu, relu)


def output_is_an_input(gm: GraphModule) -> None:
    set_output(gm, 0, placeholder(gm, "activation"))


def output_is_a_view_of_an_input(gm: GraphModule) -> None:
    view = emit(gm, aten.view.default, placeholder(gm, "activation"), [16, 3])
    set_output(gm, 0, emit(gm, aten.permute.default, view, [1, 0]))


def output_is_no_view_any_more(gm: GraphModule) -> None:
    x = placeholder(gm, "activation")
    set_output(gm, 1, emit(gm, aten.mul.Tensor, emit(gm, aten.view.default, x, [4, 12]), 1.0))


def removed_input(gm: GraphModule) -> None:
    node = gm.graph.find_nodes(op="placeholder")[0]
    zeros = Rewriter(gm, "test").constant(torch.zeros(tuple(node.meta["val"].shape)), before=node.next, name="zeros")
    gm.graph.erase_node(zeros)
    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
        constant = gm.graph.get_attr("zeros_0")
    constant.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(constant)
    gm.graph.erase_node(node)


def renamed_input(gm: GraphModule) -> None:
    placeholder(gm, "parameter").name = "somebody_else"


def reordered_inputs(gm: GraphModule) -> None:
    one, two, *_ = gm.graph.find_nodes(op="placeholder")
    two.append(one)


def added_input(gm: GraphModule) -> None:
    placeholders = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_after(placeholders[-1]):
        node = gm.graph.placeholder("extra")
    node.meta = {"val": placeholders[0].meta["val"], "input": Input("parameter", "extra", len(placeholders))}


def dialect_too_early(gm: GraphModule) -> None:
    emit(gm, ops.quantize, first(gm, aten.relu.default), [], "row", torch.int8)


def missing_constant(gm: GraphModule) -> None:
    with gm.graph.inserting_before(output_of(gm.graph)):
        node = gm.graph.create_node("get_attr", "no_such_table")
    node.meta["val"] = first(gm, aten.relu.default).meta["val"]


def changed_output_dtype(gm: GraphModule) -> None:
    old = output_of(gm.graph).args[0][0]  # type: ignore[index]
    set_output(gm, 0, emit(gm, aten._to_copy.default, old))
    output_of(gm.graph).args[0][0].kwargs = {"dtype": torch.float64}  # type: ignore[index, union-attr]
    output_of(gm.graph).args[0][0].meta["val"] = old.meta["val"].double()  # type: ignore[index, union-attr]


def changed_output_shape(gm: GraphModule) -> None:
    set_output(gm, 0, emit(gm, aten.unsqueeze.default, first(gm, aten.relu.default), 0))


def lost_output(gm: GraphModule) -> None:
    output_of(gm.graph).args = (output_of(gm.graph).args[0][:1],)  # type: ignore[index]


def added_output(gm: GraphModule) -> None:
    output_of(gm.graph).args = ((*output_of(gm.graph).args[0], first(gm, aten.relu.default)),)  # type: ignore[misc]


def used_before_it_is_made(gm: GraphModule) -> None:
    relu = first(gm, aten.relu.default)
    output_of(gm.graph).prepend(relu)


BROKEN: list[tuple[Callable[[GraphModule], None], str]] = [
    (missing_value, "node relu has no metadata value"),
    (missing_value_of_an_input, "node .* has no metadata value"),
    (wrong_shape, r"metadata of relu must be true; it says \(\('16', '3'\).*aten.relu.default gives \(\('3', '16'\)"),
    (wrong_dtype, "metadata of relu must be true; it says .*float64.* gives .*float32"),
    (arguments_that_do_not_fit, r"addmm must take its arguments; aten\.addmm\.default says: .*same reduction dim"),
    (foreign_write, r"only copy_ into an input may write; new calls aten\.add_\.Tensor"),
    (write_into_a_value, r"only copy_ into an input may write; new calls aten\.copy_\.default"),
    (output_is_an_input, "an output must not become an alias of an input"),
    (output_is_a_view_of_an_input, "an output must not become an alias of an input"),
    (output_is_no_view_any_more, "an output must not become an alias of an input, or of another one than before"),
    (removed_input, "inputs must stay as they are"),
    (renamed_input, "inputs must stay as they are; .* became .*somebody_else"),
    (reordered_inputs, "inputs must stay as they are"),
    (added_input, "only statistics may be added as inputs; extra is parameter"),
    (dialect_too_early, r"stage captured does not allow qcompile\.quantize\.default, at new"),
    (missing_constant, "no_such_table does not exist|references nonexistent attribute no_such_table"),
    (changed_output_dtype, "outputs must keep shape and dtype; .*float32.* became .*float64"),
    (changed_output_shape, r"outputs must keep shape and dtype; .* became .*'1', '3', '16'"),
    (lost_output, "outputs must keep shape and dtype"),
    (added_output, "outputs must keep shape and dtype"),
    (used_before_it_is_made, "the graph is not well-formed: .*relu"),
]


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node with no underlying reference:UserWarning")
@pytest.mark.parametrize(("edit", "message"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_every_break_has_its_message(edit: Callable[[GraphModule], None], message: str) -> None:
    with pytest.raises(VerifyError, match=message) as caught:
        checked(graph(), edit)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("full", [True, False])
def test_an_unbroken_graph_passes(full: bool) -> None:
    checked(graph(), lambda gm: None, full=full)


def test_only_the_full_check_recomputes_values() -> None:
    checked(graph(), wrong_dtype, full=False)


def test_statistics_may_be_added() -> None:
    checked(graph(), lambda gm: void(Rewriter(gm, "test").statistic(placeholder(gm, "parameter"), 16)))


def void(_: object) -> None:
    """Drops a result."""


@pytest.mark.parametrize("stage", ["observed", "quantized"])
def test_only_observers_add_outputs(stage: str) -> None:
    if stage == "observed":
        checked(graph(), added_output, stage=stage)
    else:
        with pytest.raises(VerifyError, match="outputs must keep shape and dtype"):
            checked(graph(), added_output, stage=stage)


STAGES = {
    ops.observe: {"observed"},
    ops.smoothing_scale: {"smoothed", "quantized"},
    ops.search_smoothing_scale: {"smoothed", "quantized"},
    ops.power_of_two: {"smoothed", "quantized"},
    ops.rescale: {"smoothed", "quantized"},
    ops.quantize: {"quantized"},
    ops.quantize_static: {"quantized"},
    ops.static_scale: {"quantized"},
    ops.clipped_static_scale: {"quantized"},
    ops.concatenate: {"quantized"},
    ops.scaled_mm: {"quantized"},
    ops.accumulate: {"quantized"},
    ops.from_sums: {"quantized"},
    ops.attention: {"quantized"},
    grouped_linear: {"captured", "observed", "smoothed", "quantized"},
    scaled_grouped_mm: {"quantized"},
}


def test_what_a_quantized_model_brings_along_is_legal_everywhere() -> None:
    gm = graph()
    relu = first(gm, aten.relu.default)
    with gm.graph.inserting_after(relu):
        gm.graph.call_function(ops.scaled_mm, (relu,)).meta["val"] = relu.meta["val"]
    for stage in ("captured", "observed", "smoothed", "quantized"):
        checked(gm, lambda gm: None, stage=stage, full=False)


@pytest.mark.parametrize("operator_", STAGES, ids=str)
@pytest.mark.parametrize("stage", ["captured", "observed", "smoothed", "quantized", "lowered"])
def test_each_operator_has_its_stages(operator_: Any, stage: str) -> None:
    assert set(STAGES) == set(ops.REFERENCES)

    def edit(gm: GraphModule) -> None:
        relu = first(gm, aten.relu.default)
        with gm.graph.inserting_after(relu):
            gm.graph.call_function(operator_, (relu,)).meta["val"] = relu.meta["val"]

    if stage in STAGES[operator_]:
        checked(graph(), edit, stage=stage, full=False)
    else:
        with pytest.raises(VerifyError, match=f"stage {stage} does not allow"):
            checked(graph(), edit, stage=stage, full=False)


def leak(gm: GraphModule, kind: str) -> None:
    """Let an 8-bit value out of the dialect, on one of the ways it may travel."""
    relu = first(gm, aten.relu.default)
    if kind == "static":
        scale = emit(gm, ops.static_scale, placeholder(gm, "parameter"), [], torch.int8)
        value = emit(gm, ops.quantize_static, relu, scale, [], torch.int8)
    else:
        dtype = torch.float8_e4m3fn if kind == "fp8" else torch.int8
        value = emit(gm, operator.getitem, emit(gm, ops.quantize, relu, [], "row", dtype), 0)
    if kind == "merged":
        value = emit(gm, aten.cat.default, [value, value])
    if kind == "transposed":
        value = emit(gm, aten.permute.default, value, [1, 0])
    emit(gm, aten._to_copy.default, value)


@pytest.mark.parametrize("kind", ["dynamic", "fp8", "static", "merged", "transposed"])
def test_quantized_values_stay_in_the_dialect(kind: str) -> None:
    with pytest.raises(
        VerifyError, match=r"torch\.(int8|float8_e4m3fn) values may only enter the dialect; new.* reads"
    ):
        checked(graph(), lambda gm: leak(gm, kind), stage="quantized")


def test_a_models_own_integers_are_its_own_business() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + (x > 0).to(torch.int8).cumsum(-1)

    config = Config(verify=True)
    passes.quantizing(config).run(captured(Own(), torch.randn(2, 16)).graph, [Verify(full=True)])


@pytest.mark.parametrize("kind", [GatedMLP, Attention, Both])
@pytest.mark.parametrize("options", [
    {}, {"calibrate": 1}, {"calibrate": 1, "activations": "static"}, {"dtype": "fp8", "activations": "tensor"},
], ids=str)  # fmt: skip
def test_the_real_pipelines_pass(kind: type[nn.Module], options: dict[str, Any]) -> None:
    shape = (3, 16) if kind is Both else (2, 5, 16)
    gm = captured(kind(), torch.randn(shape), dynamic=kind is not Both).graph
    config = Config(**options)
    for pipeline in (passes.quantizing(config), passes.observing(config)):
        pipeline.run(gm, [Verify(full=True)])


@dataclasses.dataclass(frozen=True)
class DropValues:
    """A pass that forgets metadata."""

    really: bool = False
    name: ClassVar[str] = "drop_values"
    stage: ClassVar[str] = "any"
    bound: ClassVar[Any] = "exact"

    def run(self, gm: GraphModule) -> PassResult:
        if self.really:
            missing_value(gm)
        return PassResult(1)


def test_the_pass_is_named() -> None:
    pipeline = Pipeline((Canonicalize(), DropValues(), FindLinears(), DropValues(really=True)))
    with pytest.raises(VerifyError, match="^after pass drop_values{really=True}: node relu has no metadata value"):
        pipeline.run(graph(), [Verify(full=False)])


def test_a_pass_is_held_to_the_stage_before_it() -> None:
    steps = (Canonicalize(), FindLinears(), QuantizeLinears(), InsertObservers())
    with pytest.raises(VerifyError, match=r"^after pass insert_observers: stage observed does not allow qcompile\."):
        Pipeline(steps).run(graph(), [Verify(full=False)])


def test_one_verifier_serves_several_runs() -> None:
    verify = Verify(full=True)
    for pipeline in (passes.quantizing(Config()), passes.observing(Config())):
        pipeline.run(graph(), [verify])


def test_the_backend_reports_a_broken_pass_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = passes.quantizing
    monkeypatch.setattr(
        passes, "quantizing", lambda config: Pipeline((*honest(config).passes[:2], DropValues(really=True)))
    )
    with torch.no_grad(), pytest.raises(PassError, match="after pass drop_values{really=True}: node relu has no"):
        compiled(ReluMLP())(torch.randn(2, 16))
