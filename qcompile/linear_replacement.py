"""Put QuantizedLinears where a quantized graph says a model's linears are, one at a time.

Weights are quantized in blocks of rows, and each float weight is let go before the next one is touched: a model never
needs much more memory than its float weights took.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import Node

from qcompile import ops
from qcompile.errors import WeightError
from qcompile.memory import give_back
from qcompile.parameter_edits import ParameterEdits, name_of
from qcompile.passes.find_linears import info_of
from qcompile.quantize_weight import parts, quantize_weight
from qcompile.quantized_linear import QuantizedLinear
from qcompile.rewrite import args_of, module_of

STATIC_SCALES = (ops.static_scale, ops.clipped_static_scale)


class LinearReplacement:
    """The replacements that a graph after `passes.storing` asks for."""

    def __init__(self, model: nn.Module, edits: ParameterEdits) -> None:
        self._model, self._edits = model, edits
        # A module that the model calls several times has several products.
        self._products: dict[nn.Module, list[Node]] = {}
        for product in edits.gm.graph.find_nodes(op="call_function", target=ops.scaled_mm):
            self._products.setdefault(model.get_submodule(module_of(product)), []).append(product)
        self._input_scales: dict[tuple[int, ...], nn.Parameter] = {}

    def __len__(self) -> int:
        return len(self._products)

    @torch.no_grad()
    def check(self) -> None:
        """Raises WeightError if a weight, or the scale it gets, is not finite. Changes nothing."""
        for products in self._products.values():
            weight, factors, dtype, scale_dtype = weight_of(self._edits, products[0])
            if _is_small_enough(weight, factors, scale_dtype):
                continue
            for _, rows, pieces in parts(weight, factors):
                if not bool(torch.isfinite(ops.row_scale(rows, pieces, dtype, scale_dtype)).all()):
                    name = name_of(self._edits.args[parameter_of(products[0])])
                    raise not_finite(name)

    @torch.no_grad()
    def write(self, advance: Callable[[], None] = lambda: None) -> None:
        """Replace every linear. `advance` is called after each."""
        owners = _owners(self._model, set(self._products))
        readers: dict[int, int] = {}
        for products in self._products.values():
            readers[parameter_of(products[0])] = readers.get(parameter_of(products[0]), 0) + 1
        while self._products:
            module = next(iter(self._products))
            products = self._products.pop(module)
            new = self._quantized(module, products)
            for parent, name in owners.pop(module):
                setattr(parent, name, new)
            readers[parameter_of(products[0])] -= 1
            if not readers[parameter_of(products[0])]:
                self._edits.release(parameter_of(products[0]))
            del module  # the last reference to the float weight
            give_back()
            advance()

    def _quantized(self, module: nn.Module, products: list[Node]) -> QuantizedLinear:
        weight, factors, dtype, scale_dtype = weight_of(self._edits, products[0])
        q, scale = quantize_weight(weight, factors, "row", dtype, scale_dtype)
        bias: Tensor | None = getattr(module, "bias", None)
        is_conv1d = not isinstance(module, nn.Linear)
        return QuantizedLinear(q.contiguous(), scale, bias, self._input_scale(products), is_conv1d=is_conv1d)

    def _input_scale(self, products: list[Node]) -> nn.Parameter | None:
        """The largest static scale among a module's calls. Siblings share the object."""
        steps = [args_of(product)[2] for product in products]
        if any(step.target not in STATIC_SCALES for step in steps):
            return None
        groups = tuple(info_of(product).group for product in products)
        if groups not in self._input_scales:
            scale = torch.stack(self._edits.values(steps)).amax().reshape(1)
            _, _, _, scale_dtype = weight_of(self._edits, products[0])
            self._input_scales[groups] = nn.Parameter(ops.representable(scale, scale_dtype), requires_grad=False)
        return self._input_scales[groups]


def weight_of(edits: ParameterEdits, product: Node) -> tuple[Tensor, list[Tensor], torch.dtype, torch.dtype]:
    """A product's float weight [..., N, K], its smoothing factors, the dtype it is quantized to and that of scales."""
    step: Node = args_of(args_of(product)[1])[0]
    weight, factors, _, dtype, scale_dtype = args_of(step)
    weight, *factors = edits.values([weight, *factors])
    return weight, factors, dtype, scale_dtype


def not_finite(name: str) -> WeightError:
    """What is wrong with a weight of this name that has no finite scale."""
    return WeightError(
        f"weights and their scales must be finite; {name} has NaN or Inf, or is too large for its dtype once smoothed; "
        "nothing was changed; check the checkpoint, or use another alpha"
    )


def parameter_of(product: Node) -> int:
    """The index of the captured argument that a product's weight is made from."""
    index = info_of(product).parameter
    assert index is not None
    return index


def _is_small_enough(weight: Tensor, factors: list[Tensor], scale_dtype: torch.dtype) -> bool:
    """Whether a bound already shows that no row's scale overflows: much cheaper than the scales themselves."""
    bound = torch.stack(weight.detach().aminmax(dim=0)).abs().amax(0).double()  # NaN and Inf go through
    for factor in factors:
        bound = bound * (factor.amax() if factor.ndim == 2 else factor)
    return float(bound.max()) < torch.finfo(scale_dtype).max and bool(bound.isfinite().all())


def _owners(model: nn.Module, modules: set[nn.Module]) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            if child in modules:
                found.setdefault(child, []).append((parent, name))
    return found
