"""Each transfer rule: exact in float64 under hostile statistics; what folds is what docs/smoothing.md says."""

import pytest
import torch
from gauge_cases import places, products, values  # noqa: F401 — importing them fills CASES
from gauge_cases.cases import CASES, capture, example, model
from graphs import captured
from probe import randomized, smoothed

from qcompile.passes import gauge_rules
from qcompile.passes.smooth import Smooth

aten = torch.ops.aten


@pytest.mark.parametrize("name", CASES)
def test_the_identity_holds(name: str) -> None:
    case, found = CASES[name], smoothed(capture(name), Smooth(absorb=False))
    targets = {node.target for node in found.gm.graph.nodes}
    assert any(gauge_rules.RULES.get(target, gauge_rules.pin_all) is case.rule for target in targets)
    found.assert_exact()
    assert found.folded == case.folds
    assert set(found.unfolded) == set(case.unfolded)
    for linear, reason in case.unfolded.items():
        assert reason in found.unfolded[linear]


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fold_is_absorbed(name: str) -> None:
    found = smoothed(capture(name), Smooth())
    assert not found.unfolded
    found.assert_exact()


def test_every_rule_has_a_case() -> None:
    rules = {*gauge_rules.RULES.values(), gauge_rules.pin_all}
    elsewhere = {gauge_rules.reads_shape, gauge_rules.grouped}  # below, and in test_gauge_products.py
    assert {case.rule for case in CASES.values()} == rules - elsewhere


def test_reading_a_size_scales_nothing() -> None:
    """Capture takes sizes from graph inputs; other front ends ask a tensor."""
    subject = captured(randomized(model(values.relu)), example(), dynamic=True)
    graph = subject.graph.graph
    (product,) = graph.find_nodes(op="call_function", target=aten.relu.default)
    tokens = product.meta["val"].shape[1]
    (given,) = [node for node in graph.find_nodes(op="placeholder") if str(node.meta["val"]) == str(tokens)]
    with graph.inserting_after(product):
        size = graph.call_function(aten.sym_size.int, (product, 1))
    size.meta["val"] = tokens
    assert given.replace_all_uses_with(size, lambda user: user > product)
    found = smoothed(subject, Smooth(absorb=False))
    assert found.folded == {"up", "fc"}
    found.assert_exact()


def test_a_fused_rms_norm_has_a_gain() -> None:
    """Capture keeps it whole on devices that have a kernel for it."""
    subject = captured(randomized(model(products.layer_norm_without_bias)), example())
    graph = subject.graph.graph
    (norm,) = graph.find_nodes(op="call_function", target=aten.native_layer_norm.default)
    x, width, gain, _, epsilon = norm.args
    norm.target, norm.args = aten._fused_rms_norm.default, (x, width, gain, epsilon)
    norm.meta["val"] = norm.meta["val"][:2]
    found = smoothed(subject, Smooth(absorb=False))
    assert found.folded == {"fc"}
    found.assert_exact()
