"""Pinning: what an op without a rule reads is not scaled, and its result says which op was in the way."""

from typing import Any

import torch
from graphs import captured
from probe import Body, probe, randomized
from torch import Tensor, nn

from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.gauge import analyse
from qcompile.rewrite import copy_graph


def parts() -> dict[str, nn.Module]:
    return {"norm": nn.LayerNorm(16), "up": nn.Linear(16, 16), "fc": nn.Linear(16, 5)}


def test_an_op_without_a_rule_pins_its_operands_and_its_result() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.fc(torch.tanh(m.up(m.norm(x))))

    found = probe(Body(body, **parts()), torch.randn(2, 3, 16, dtype=torch.float64))
    assert found.folded == {"up"}
    assert found.unfolded["fc"].startswith("no scale passes through, tanh")
    found.assert_exact()


def test_all_results_of_a_tuple_are_pinned() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        values, _ = m.up(m.norm(x)).sort(-1)
        return m.fc(values)

    subject = captured(randomized(Body(body, **parts())), torch.randn(2, 3, 16, dtype=torch.float64))
    gm = copy_graph(subject.graph)
    Canonicalize().run(gm)
    sweep = analyse(gm)
    (sort,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sort.default)
    values, indices = sweep.results(sort)
    assert not sweep.any_free(values)
    assert not sweep.any_free(indices)
    assert "sort" in sweep.variables.reason(int(values.flatten()[0]))
