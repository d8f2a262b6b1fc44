"""transformers' hooks for loading into QuantizedLinears: modules are swapped on the meta device before weights arrive.

Registered under a method name of our own and passed to `from_pretrained` explicitly, so that what transformers does
with "compressed-tensors" stays as it is. Importing this module needs transformers.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qcompile.checkpoint.folder import Stored
from qcompile.checkpoint.formats import SCALE_NAMES, Layout
from qcompile.checkpoint.original_names import matrices_of
from qcompile.checkpoint.saving import stored_names
from qcompile.errors import CheckpointError
from qcompile.quantized_experts import STACKS, become_quantized, why_not_quantized
from qcompile.quantized_linear import QuantizedLinear, quantized_linears

METHOD = "qcompile"


@register_quantization_config(METHOD)
class LoadingConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """layout: parsed `original`, the quantization_config of the folder. tensors: what its files hold."""

    def __init__(
        self, layout: Layout | None = None, original: Mapping[str, Any] | None = None, tensors: Any = None, **_: Any
    ) -> None:
        self.quant_method = METHOD
        self.layout, self.original, self.tensors = layout, original, tensors

    def to_dict(self) -> dict[str, Any]:
        """The original method, for whoever reads what is saved again."""
        return dict(self.original or {})


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps modules before loading; lets 8-bit tensors through as they are."""

    def __init__(self, quantization_config: LoadingConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **{**kwargs, "pre_quantized": True})

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        self._experts = make_room(model, config.layout, config.tensors)
        check_tensors(model, config.layout, config.tensors)

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """What fuses experts' matrices into a stack fuses their scales likewise."""
        from transformers.core_model_loading import WeightConverter

        found = []
        for converter in weight_conversions:
            found.append(converter)
            if isinstance(converter, WeightConverter) and self._fuses_quantized(converter):
                sources, targets = converter._original_source_patterns, converter._original_target_patterns
                suffixed = [[f"{pattern}_scale" for pattern in patterns] for patterns in (sources, targets)]
                scales = WeightConverter(*suffixed, operations=list(converter.operations))
                for scope in ("scope_prefix", "base_model_prefix"):
                    if hasattr(converter, scope):
                        setattr(scales, scope, getattr(converter, scope))
                found.append(scales)
        return found + self.get_weight_conversions()

    def _fuses_quantized(self, converter: Any) -> bool:
        """Whether a converter makes a stack that the files hold in 8 bits, of matrices and nothing else."""
        plain = all(pattern.endswith(".weight") for pattern in converter._original_source_patterns)
        targets = converter._original_target_patterns
        return plain and len(targets) == 1 and any(re.search(f"{targets[0]}$", name) for name in self._experts)

    def get_weight_conversions(self) -> list[Any]:
        if self.quantization_config.layout.format != "lmdeploy":
            return []
        from transformers.core_model_loading import WeightRenaming

        return [WeightRenaming(r"\.scale$", ".weight_scale")]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """8-bit parameters take what the file holds; the check after loading then sees a wrong dtype."""
        if dtype is not None and dtype.itemsize == 1:
            return None
        new: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return new

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        return stored_names(model, self.quantization_config.layout.format), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def make_room(model: nn.Module, layout: Layout, tensors: Mapping[str, Stored] | None) -> set[str]:
    """Replace what a layout names by empty modules; the names of stacks of experts. tensors: what the files hold; None
    if nobody knows, then the layout is believed. Raises CheckpointError if there is nothing of it."""
    experts = swap_experts(model, layout, tensors)
    if not swap(model, layout, tensors) and not experts:
        raise CheckpointError("quantization_config must name linears of the model; none of its targets is there")
    return experts


def swap(model: nn.Module, layout: Layout, tensors: Mapping[str, Stored] | None) -> int:
    """Replace the linears that a layout names by empty QuantizedLinears; how many there are."""
    swapped = 0
    for name, module in list(model.named_modules()):
        shape = _linear_shape(module)
        if shape is None:
            continue
        scheme = layout.scheme_of(name, [kind.__name__ for kind in type(module).__mro__])
        if scheme is not None and not (layout.format == "lmdeploy" and _is_float(name, tensors)):
            bias = getattr(module, "bias", None)
            new = QuantizedLinear.empty(shape, scheme.torch_dtype, None if bias is None else bias.dtype, scheme.static)
            new.is_conv1d = not isinstance(module, nn.Linear)
            _take_one_scale(new, name, tensors or {})
            model.set_submodule(name, new)
            swapped += 1
    return swapped


def swap_experts(model: nn.Module, layout: Layout, tensors: Mapping[str, Stored] | None) -> set[str]:
    """Make room for the stacks of experts that files hold in 8 bits; their names. Raises CheckpointError."""
    found = set()
    for name, module in list(model.named_modules()):
        if why_not_quantized(module):
            continue
        for stack in STACKS:
            parameter = module._parameters.get(stack)
            if parameter is None or parameter.ndim != 3:
                continue
            matrices = matrices_of(model, f"{name}.{stack}")
            dtype = _dtype_of_experts(matrices, layout, tensors)
            if dtype is not None:
                weight = torch.empty(parameter.shape, dtype=dtype, device="meta")
                scale = torch.empty(*parameter.shape[:2], 1, dtype=torch.float32, device="meta")
                become_quantized(module).put(stack, weight, scale)
                found.add(f"{name}.{stack}")
    return found


def _dtype_of_experts(
    matrices: Mapping[str, tuple[int, ...]], layout: Layout, tensors: Mapping[str, Stored] | None
) -> torch.dtype | None:
    """The 8-bit dtype that files have for a stack's matrices, all of them there; None if they have them in float."""
    if tensors is None:
        schemes = [layout.scheme_of(name, ["Linear"]) for name in matrices]
        return schemes[0].torch_dtype if schemes and schemes[0] is not None else None
    first = next((tensors[f"{name}.weight"] for name in matrices if f"{name}.weight" in tensors), None)
    if first is None or first.dtype is None or first.dtype.itemsize > 1:
        return None
    for name, (rows, columns) in matrices.items():
        scheme = layout.scheme_of(name, ["Linear"])
        if scheme is None or scheme.static or scheme.torch_dtype != first.dtype:
            raise CheckpointError(
                f"experts in 8 bits must be listed in quantization_config, with scales per token; {name} is "
                f"{first.dtype}, it says {scheme or 'nothing of it'}"
            )
        scale = f"{name}.{SCALE_NAMES[layout.format]}"
        for tensor, shape in ((f"{name}.weight", (rows, columns)), (scale, (rows, 1))):
            stored = tensors.get(tensor)
            if stored is None or stored.shape != shape:
                what = "is missing" if stored is None else f"has shape {list(stored.shape)}"
                raise CheckpointError(f"every expert must be stored whole; {tensor} must be {list(shape)}, it {what}")
        if tensors[f"{name}.weight"].dtype != first.dtype:
            raise CheckpointError(f"experts of one stack must have one dtype; {name}.weight has another")
    return first.dtype


def _take_one_scale(linear: QuantizedLinear, name: str, tensors: Mapping[str, Stored]) -> None:
    """Others may store one scale for a whole weight, and scalars without a dimension; `spread` brings them in form."""
    for attribute in ("weight_scale", "input_scale"):
        stored = tensors.get(f"{name}.{attribute}")
        if stored is not None and stored.shape in ((), (1,), (1, 1)) and getattr(linear, attribute) is not None:
            empty = torch.empty(stored.shape, dtype=torch.float32, device="meta")
            setattr(linear, attribute, nn.Parameter(empty, requires_grad=False))


def spread(linear: QuantizedLinear) -> None:
    """Scales after loading: weight_scale [N, 1], input_scale [1]."""
    weight_scale = linear.weight_scale.detach().reshape(-1, 1).expand(linear.out_features, 1)
    linear.weight_scale = nn.Parameter(weight_scale.contiguous(), requires_grad=False)
    if linear.input_scale is not None:
        linear.input_scale = nn.Parameter(linear.input_scale.detach().reshape(1), requires_grad=False)


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return outputs, inputs
    return None


def _is_float(name: str, tensors: Mapping[str, Stored] | None) -> bool:
    """LMDeploy need not list what it left in float; the file shows it."""
    if tensors is None:
        return False
    stored = tensors.get(f"{name}.weight")
    return stored is None or (stored.dtype is not None and stored.dtype.itemsize > 1)


def check_tensors(model: nn.Module, layout: Layout | None, tensors: Mapping[str, Stored]) -> None:
    """Hold what the files say they hold against what the model needs, before anything is read or allocated.

    Names that transformers converts while loading are left to its own report. Raises CheckpointError.
    """
    quantized = quantized_linears(model)
    scale = SCALE_NAMES[layout.format] if layout is not None else ""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for key, expected in model.state_dict().items():
        owner, _, attribute = key.rpartition(".")
        key = f"{owner}.{scale}" if owner in quantized and attribute == "weight_scale" else key
        found = tensors.get(key) or tensors.get(key.removeprefix(prefix)) or tensors.get(prefix + key)
        if found is None:
            continue
        shape = tuple(expected.shape)
        if found.shape != shape:
            raise CheckpointError(f"{key} must have shape {list(shape)}, as config.json says; got {list(found.shape)}")
        if owner in quantized and attribute == "weight" and found.dtype != expected.dtype:
            raise CheckpointError(f"{key} must be {expected.dtype}, as quantization_config says; got {found.dtype}")
        if expected.dtype.itemsize > 1 and expected.is_floating_point() and not _is_wide(found):
            raise CheckpointError(f"{key} must be floating point; got {found.dtype}; the checkpoint is of another kind")


def _is_wide(stored: Stored) -> bool:
    return stored.dtype is not None and stored.dtype.is_floating_point and stored.dtype.itemsize > 1
