"""Models in which smoothing has something to do, and what of them a change in place has changed."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def with_outliers(kind: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in which smoothing has something to do: some channels of its norms are 30 times the others."""
    model = kind().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter[::5] *= 30
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    return model.to(dtype)  # after all that is random, which other dtypes and versions draw in other ways


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x)
    return y


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def kind_with(kind: type[nn.Module], parameters: dict[str, Tensor]) -> nn.Module:
    model = kind().eval().to(next(iter(parameters.values())).dtype)
    model.load_state_dict(parameters)
    return model
