"""The two checkpoint formats: what their `quantization_config` says, and how their tensors are called.

compressed-tensors (vLLM, SGLang, transformers): `X.weight` [N, K], `X.weight_scale` [N, 1], `X.input_scale` [1] if
static. LMDeploy smooth_quant: `X.weight` [N, K], `X.scale` [N, 1] float32; activations are always dynamic, per token.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from qcompile.checkpoint.patterns import Patterns
from qcompile.errors import CheckpointError
from qcompile.ops import TORCH_DTYPES

Format = Literal["compressed-tensors", "lmdeploy"]
# The schema that the written config follows; packages of that version and later read it.
COMPRESSED_TENSORS_VERSION = "0.17.0"
NUMBER_TYPES = {"int8": "int", "fp8": "float"}
LMDEPLOY_DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
SCALE_NAMES: dict[Format, str] = {"compressed-tensors": "weight_scale", "lmdeploy": "scale"}
UNUSED = ("kv_cache_scheme", "sparsity_config", "transform_config")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one linear is quantized: "int8", "fp8" or "fp8_e5m2"; activations per token, or static per tensor."""

    dtype: str
    static: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Group:
    """Linears that share a scheme. targets: class names, module names, or "re:" patterns over module names."""

    scheme: Scheme
    targets: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a `quantization_config` says: which linears are quantized, and how."""

    format: Format
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    patterns: Patterns = dataclasses.field(default_factory=Patterns, repr=False, compare=False)

    def scheme_of(self, name: str, kinds: Sequence[str]) -> Scheme | None:
        """The scheme of a module with these class names (its own and its bases'); None if it stays in float.
        Raises CheckpointError for patterns that cannot be matched."""
        if self.format == "lmdeploy":  # names of modules, or of what holds them; MoE models list thousands
            ignored = any(f".{kept}." in f".{name}." for kept in self.ignore)
        else:
            ignored = any(self._is_match(target, name, kinds) for target in self.ignore)
        if ignored:
            return None
        for group in self.groups:
            if any(self._is_match(target, name, kinds) for target in group.targets):
                return group.scheme
        return None

    def _is_match(self, target: str, name: str, kinds: Sequence[str]) -> bool:
        if target.startswith("re:"):
            return self.patterns.match(target[3:], name)
        return target == name or target in kinds


def check_name(format_: str) -> None:
    """Raises CheckpointError unless it is a format."""
    if format_ not in get_args(Format):
        raise CheckpointError(f"format must be one of {', '.join(get_args(Format))}; got {format_!r}")


def write(
    format_: Format, schemes: Mapping[Scheme, Sequence[str]], ignore: Sequence[str], kinds: Sequence[str]
) -> dict[str, Any]:
    """The `quantization_config` of a model. schemes: module names by scheme. kinds: class names of what is quantized.

    Raises CheckpointError if the format cannot express a scheme.
    """
    check_name(format_)
    if format_ == "lmdeploy":
        return _write_lmdeploy(list(schemes), ignore)
    groups = {}
    for number, (scheme, modules) in enumerate(schemes.items()):
        if scheme.dtype not in NUMBER_TYPES:
            raise CheckpointError(
                f'compressed-tensors holds int8 and fp8 (e4m3); got {scheme.dtype}; use format="lmdeploy"'
            )
        targets = list(kinds) if len(schemes) == 1 else list(modules)
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": _arguments(scheme, "channel", dynamic=False),
            "input_activations": _arguments(scheme, "tensor" if scheme.static else "token", dynamic=not scheme.static),
            "output_activations": None,
        }
    number_types = {NUMBER_TYPES[scheme.dtype] for scheme in schemes}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{number_types.pop()}-quantized" if len(number_types) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": COMPRESSED_TENSORS_VERSION,
    }


def _arguments(scheme: Scheme, strategy: str, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": NUMBER_TYPES[scheme.dtype],
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
        "group_size": None,
    }


def _write_lmdeploy(schemes: Sequence[Scheme], ignore: Sequence[str]) -> dict[str, Any]:
    if any(scheme.static for scheme in schemes):
        raise CheckpointError(
            'LMDeploy\'s format holds no activation scales; the model has static ones; use '
            'format="compressed-tensors", or quantize with activations="token"'
        )
    if len(schemes) != 1:
        raise CheckpointError(
            f'LMDeploy\'s format holds one dtype; the model has {len(schemes)}; use format="compressed-tensors"'
        )
    dtype = LMDEPLOY_DTYPES[schemes[0].dtype]
    return {"quant_method": "smooth_quant", "quant_dtype": dtype, "modules_to_not_convert": list(ignore)}


def read(config: object) -> Layout:
    """What a `quantization_config` says. Raises CheckpointError unless it is 8-bit weights and activations."""
    if not isinstance(config, dict):
        raise CheckpointError(f"quantization_config must be an object; got {type(config).__name__}")
    method = config.get("quant_method")
    if method == "compressed-tensors":
        return _read_compressed_tensors(config)
    if method == "smooth_quant":
        dtype = config.get("quant_dtype", "int8")
        names = {stored: name for name, stored in LMDEPLOY_DTYPES.items()}
        if not isinstance(dtype, str) or dtype not in names:
            raise CheckpointError(f"quant_dtype must be one of {', '.join(names)}; got {dtype!r}")
        kept = _strings("modules_to_not_convert", config.get("modules_to_not_convert"))
        return Layout("lmdeploy", (Group(Scheme(names[dtype], static=False), ("Linear", "Conv1D")),), kept)
    raise CheckpointError(
        f"quant_method must be compressed-tensors or smooth_quant (LMDeploy); got {method!r}; load it with the tool "
        "that wrote it, or quantize the float model"
    )


def _read_compressed_tensors(config: dict[str, Any]) -> Layout:
    for key in UNUSED:
        if config.get(key):
            raise CheckpointError(f"quantization_config must have no {key}; got {str(config[key])[:80]}; not supported")
    status = config.get("quantization_status", "compressed")
    if status != "compressed":
        raise CheckpointError(f"quantization_status must be compressed; got {status!r}; save the model compressed")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"quantization_config must have config_groups; got {groups!r}")
    read_groups = tuple(_read_group(name, group) for name, group in groups.items())
    return Layout("compressed-tensors", read_groups, _strings("ignore", config.get("ignore")))


def _read_group(name: str, group: object) -> Group:
    if not isinstance(group, dict):
        raise CheckpointError(f"{name} of config_groups must be an object; got {group!r}")
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict) or not isinstance(inputs, dict):
        raise CheckpointError(f"{name} must quantize weights and input_activations (W8A8); one of them is missing")
    if group.get("output_activations"):
        raise CheckpointError(f"{name} must not quantize output_activations; not supported")
    _check("weights", weights, ("channel", "tensor"), dynamic=False)
    static = not inputs.get("dynamic", False)
    _check("input_activations", inputs, ("tensor",) if static else ("token",), dynamic=not static)
    if weights["type"] != inputs["type"]:
        raise CheckpointError(f"{name} must have one number type; got {weights['type']} and {inputs['type']}")
    dtype = next(dtype for dtype, kind in NUMBER_TYPES.items() if kind == weights["type"])
    targets = _strings("targets", group.get("targets"))
    if not targets:
        raise CheckpointError(f"{name} must name its targets; got none")
    return Group(Scheme(dtype, static), targets)


def _check(what: str, arguments: dict[str, Any], strategies: tuple[str, ...], *, dynamic: bool) -> None:
    facts = {
        "num_bits": (8,),
        "type": ("int", "float"),
        "symmetric": (True,),
        "strategy": strategies,
        "dynamic": (dynamic,),
        "group_size": (None,),
        "block_structure": (None,),
        "actorder": (None,),
    }
    absent = {"symmetric": True, "dynamic": False, "strategy": strategies[0] if dynamic else None}
    for key, allowed in facts.items():
        value = arguments.get(key, absent.get(key))
        if (
            isinstance(value, dict | list)
            or value not in allowed
            or isinstance(value, bool) != isinstance(allowed[0], bool)
        ):
            wanted = " or ".join(map(str, allowed))
            raise CheckpointError(f"{what}: {key} must be {wanted}; got {value!r}; only symmetric W8A8 is supported")


def _strings(key: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{key} must be a list of names; got {str(value)[:80]}")
    return tuple(value)
