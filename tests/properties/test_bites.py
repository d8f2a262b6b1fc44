"""The checks bite: a result that is deliberately wrong leaves the tolerance that the right one keeps."""

from collections.abc import Callable

import graphs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties.running import adversarial, no_statistic, run
from tolerances import TOLERANCES, assert_close
from torch import Tensor, nn
from torch.fx import GraphModule

from qcompile import ops
from qcompile.pass_pipeline import Pipeline
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears
from qcompile.passes.smooth import Smooth
from qcompile.rewrite import args_of
from qcompile.validate import relative_error

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gated MLP": lambda: graphs.GatedMLP(bias=True),
    "grouped attention": lambda: graphs.Attention(bias=True),
    "post-norm": graphs.PostNorm,
    "ReLU MLP": graphs.ReluMLP,
}


@pytest.mark.parametrize("step", [Smooth(), Smooth(absorb=False, edit="parameter")], ids=["absorb", "fold"])
@pytest.mark.parametrize("name", MODELS)
def test_every_single_factor_is_needed(name: str, step: Smooth) -> None:
    model = MODELS[name]().double()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.3, 1.7)  # a bias of 0 would need no factor
    captured = graphs.captured(model, torch.randn(2, 5, 16, dtype=torch.float64))
    expected = run(captured.graph, captured, no_statistic)
    pipeline = Pipeline((Canonicalize(), FindLinears(ignore=()), step))
    factors = count_factors(pipeline.run(captured.graph)[0])
    assert factors or (name == "post-norm" and not step.absorb)
    for dropped in range(factors):
        gm, _ = pipeline.run(captured.graph)
        statistic = adversarial(gm, seed=1, decades=3.0)
        assert_close("smooth/float64", actual=run(gm, captured, statistic)[0], expected=expected[0])
        what = drop_factor(gm, dropped)
        error = relative_error(run(gm, captured, statistic)[0], expected[0])
        assert error > 1e4 * TOLERANCES["smooth/float64"].relative, what


def count_factors(gm: GraphModule) -> int:
    return sum(len(args_of(node)[1]) for node in gm.graph.find_nodes(op="call_function", target=ops.rescale))


def drop_factor(gm: GraphModule, index: int) -> str:
    """Take the index-th factor of the graph away; returns what was damaged."""
    for node in gm.graph.find_nodes(op="call_function", target=ops.rescale):
        x, factors = args_of(node)
        if index < len(factors):
            node.args = (x, [factor for i, factor in enumerate(factors) if i != index])
            gm.recompile()
            return f"{node.name} without {factors[index]}"
        index -= len(factors)
    raise IndexError(index)


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(8, 64), columns=st.integers(8, 64), k=st.integers(16, 128))
def test_a_wrong_product_leaves_its_row(seed: int, rows: int, columns: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, k, generator=generator), torch.randn(columns, k, generator=generator)
    (q, x_scale), (weight_q, weight_scale) = (ops.quantize(tensor, [], "row", torch.int8) for tensor in (x, weight))

    def product(x_scale: Tensor, weight_scale: Tensor) -> Tensor:
        return ops.scaled_mm(q, weight_q, x_scale, weight_scale, None, None, None, torch.float32)

    right = product(x_scale, weight_scale)
    assert_close("int8/linear", actual=right, expected=x @ weight.T)
    one_channel = weight_scale.clone()
    one_channel[0] *= 1.02
    size = min(rows, columns)
    swapped = [torch.cat([b[:size], a[size:]]) for a, b in ((x_scale, weight_scale * 3), (weight_scale, x_scale / 3))]
    wrong = {
        "one channel's scale off by 2%": product(x_scale, one_channel),
        "every scale off by 2%": product(x_scale * 1.02, weight_scale),
        "scales of tokens and channels exchanged": product(*swapped),
        "zeros": torch.zeros_like(right),
    }
    for what, result in wrong.items():
        assert fails("rewrite/float32", result, right), what
    for what in ("scales of tokens and channels exchanged", "zeros"):
        assert fails("int8/linear", wrong[what], x @ weight.T), what


def fails(row: str, actual: Tensor, expected: Tensor) -> bool:
    try:
        assert_close(row, actual=actual, expected=expected)
    except AssertionError:
        return True
    return False
