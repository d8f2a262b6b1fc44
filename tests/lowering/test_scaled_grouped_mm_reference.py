"""The operator itself, where nothing better runs."""

import torch

from qcompile import grouped_ops
from qcompile.lowering import scaled_grouped_mm_reference as reference
from qcompile.lowering.target import Target


def test_it_is_the_operator_and_takes_everything() -> None:
    assert reference.scaled_grouped_mm is grouped_ops.scaled_grouped_mm
    x = torch.empty(0, 1, dtype=torch.float8_e5m2)
    for target in (Target("cpu"), Target("cuda", 70), Target("mps")):
        assert reference.runs_on(target) == ""
        assert reference.takes(target, x, x) == ""
