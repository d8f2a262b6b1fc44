"""Put QuantizedLinears where a quantized graph says a model's linears are, one at a time.

Weights are quantized in blocks of rows, and each float weight is let go before the next one is touched: a model never
needs much more memory than its float weights took.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.fx import Node

from qcompile import ops
from qcompile.errors import WeightError
from qcompile.memory import give_back
from qcompile.parameter_edits import ParameterEdits, name_of
from qcompile.passes.find_linears import info_of
from qcompile.placement import linear_at, parameter_of
from qcompile.quantize_weight import parts, quantize_weight
from qcompile.quantized_linear import QuantizedLinear
from qcompile.rewrite import args_of

STATIC_SCALES = (ops.static_scale, ops.clipped_static_scale)


@dataclasses.dataclass(frozen=True)
class Product:
    """A quantized product in the graph that some edits are about."""

    edits: ParameterEdits
    node: Node

    @property
    def argument(self) -> Tensor:
        """The parameter that its weight is made from."""
        found: Tensor = self.edits.args[parameter_of(self.node)]
        return found


class LinearReplacement:
    """The replacements that graphs after `passes.storing` ask for."""

    def __init__(self, model: nn.Module, edits: Sequence[ParameterEdits]) -> None:
        self._model = model
        # A module that the model calls several times has several products.
        self._products: dict[nn.Module, list[Product]] = {}
        for product in products_of(edits, ops.scaled_mm):
            module = linear_at(model, product.node, product.argument)
            assert module is not None, f"{product.node} was placed nowhere"
            self._products.setdefault(module, []).append(product)
        self._input_scales: dict[tuple[tuple[ParameterEdits, int], ...], nn.Parameter] = {}

    def __len__(self) -> int:
        return len(self._products)

    @torch.no_grad()
    def check(self) -> None:
        """Raises WeightError if a weight, or the scale it gets, is not finite. Changes nothing."""
        for products in self._products.values():
            weight, factors, dtype, scale_dtype = weight_of(products[0])
            if _is_small_enough(weight, factors, scale_dtype):
                continue
            for _, rows, pieces in parts(weight, factors):
                if not bool(torch.isfinite(ops.row_scale(rows, pieces, dtype, scale_dtype)).all()):
                    raise not_finite(name_of(products[0].argument))

    @torch.no_grad()
    def write(self, advance: Callable[[], None] = lambda: None) -> None:
        """Replace every linear. `advance` is called after each."""
        left: Counter[int] = Counter()  # modules that still need a float weight, and all products that read it
        reading: dict[int, list[Product]] = {}
        for products in self._products.values():
            left.update([id(products[0].argument)])
            reading.setdefault(id(products[0].argument), []).extend(products)
        while self._products:
            module = next(iter(self._products))
            products = self._products.pop(module)
            become(module, self._quantized(module, products))
            key = id(products[0].argument)
            left.subtract([key])
            if not left[key]:
                release(reading.pop(key))
            del products  # the last references to the float weight
            give_back()
            advance()

    def _quantized(self, module: nn.Module, products: list[Product]) -> QuantizedLinear:
        weight, factors, dtype, scale_dtype = weight_of(products[0])
        q, scale = quantize_weight(weight, factors, "row", dtype, scale_dtype)
        bias: Tensor | None = getattr(module, "bias", None)
        is_conv1d = not isinstance(module, nn.Linear)
        return QuantizedLinear(q.contiguous(), scale, bias, self._input_scale(products), is_conv1d=is_conv1d)

    def _input_scale(self, products: list[Product]) -> nn.Parameter | None:
        """The largest static scale among a module's calls. Siblings share the object."""
        steps = [args_of(product.node)[2] for product in products]
        if any(step.target not in STATIC_SCALES for step in steps):
            return None
        groups = tuple((product.edits, info_of(product.node).group) for product in products)
        if groups not in self._input_scales:
            scales = [product.edits.values([step])[0] for product, step in zip(products, steps, strict=True)]
            _, _, _, scale_dtype = weight_of(products[0])
            scale = ops.representable(torch.stack(scales).amax().reshape(1), scale_dtype)
            self._input_scales[groups] = nn.Parameter(scale, requires_grad=False)
        return self._input_scales[groups]


def release(products: Iterable[Product]) -> None:
    """Let go of the parameters that the weights of products are made from: nothing will be computed from them."""
    for product in products:
        product.edits.release(parameter_of(product.node))


def products_of(edits: Sequence[ParameterEdits], target: object) -> list[Product]:
    """The quantized products of several graphs."""
    return [Product(one, node) for one in edits for node in one.gm.graph.nodes if node.target is target]


def weight_of(product: Product) -> tuple[Tensor, list[Tensor], torch.dtype, torch.dtype]:
    """A product's float weight [..., N, K], its smoothing factors, the dtype it is quantized to and that of scales."""
    step: Node = args_of(args_of(product.node)[1])[0]
    weight, factors, _, dtype, scale_dtype = args_of(step)
    weight, *factors = product.edits.values([weight, *factors])
    return weight, factors, dtype, scale_dtype


def not_finite(name: str) -> WeightError:
    """What is wrong with a weight of this name that has no finite scale."""
    return WeightError(
        f"weights and their scales must be finite; {name} has NaN or Inf, or is too large for its dtype once smoothed; "
        "nothing was changed; check the checkpoint, or use another alpha"
    )


def _is_small_enough(weight: Tensor, factors: list[Tensor], scale_dtype: torch.dtype) -> bool:
    """Whether a bound already shows that no row's scale overflows: much cheaper than the scales themselves."""
    bound = torch.stack(weight.detach().aminmax(dim=0)).abs().amax(0).double()  # NaN and Inf go through
    for factor in factors:
        bound = bound * (factor.amax() if factor.ndim == 2 else factor)
    return float(bound.max()) < torch.finfo(scale_dtype).max and bool(bound.isfinite().all())


def become(module: nn.Module, new: nn.Module) -> None:
    """Turn a module into another, wherever it is held: in several places, under several names, or in an object that is
    no module. What code has set on it stays."""
    new.train(module.training)
    vars(module).update(vars(new))
    module.__class__ = type(new)
