"""Counting compilations, and allowing none."""

import pytest
import torch

from qcompile.errors import ConfigError
from qcompile.generation.compiled_model import compile_in_place, compiling, settled


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(16), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(self.norm(x))
        return y


def model() -> torch.nn.Module:
    return Model().requires_grad_(False)


def test_each_shape_is_one_compilation_and_a_new_one_fails_once_settled() -> None:
    compiled = model()
    compilations = compile_in_place(compiled, "eager")
    with compiling():
        for rows in range(2, 14):  # more than Dynamo's own limit
            compiled(torch.ones(rows, 16))
    assert compilations.count == 12
    with settled():
        compiled(torch.ones(5, 16))
        with pytest.raises(RuntimeError, match="Recompilation"):
            compiled(torch.ones(20, 16))
    assert compilations.count == 12


def test_inner_is_checked() -> None:
    with pytest.raises(ConfigError, match="inner must be one of"):
        compile_in_place(model(), "fast")
