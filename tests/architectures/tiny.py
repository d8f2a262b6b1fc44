"""Tiny random instances of the architectures that transformers knows, for checks that need a model's shape only.

Configurations are shrunk generically: every size field that SIZES knows gets a small value, nested configurations
included, with a layer of every type the architecture has. OVERRIDES holds what cannot be consistent that way.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from architectures.overrides import FAMILIES, OVERRIDES, SIZES
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, MOST_KINDS = 2, 5  # a list by layer with more distinct entries does not name layer types
BATCH, TOKENS = 2, 11  # TOKENS is no channel count, nor a multiple of one
VOCABULARY = SIZES["vocab_size"]
SPECIAL = {"pad": 0, "bos": 1, "eos": 2}
LAYER_COUNTS = [
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers", "num_blocks",
]  # fmt: skip


def causal_names() -> list[str]:
    """Every architecture that AutoModelForCausalLM knows."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def family_names() -> list[str]:
    """Encoders, encoder-decoders, vision and audio models that are checked as well, as "family:model_type"."""
    return [f"{family}:{name}" for family, entries in FAMILIES.items() for name in entries]


def model_class(name: str) -> type[nn.Module]:
    """The class of an architecture: "llama", or "vision:vit"."""
    family, _, tail = name.rpartition(":")
    found = FAMILIES[family][tail] if family else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    return getattr(transformers, found if isinstance(found, str) else found[0])


def tiny_config(name: str) -> PreTrainedConfig:
    tail = name.rpartition(":")[2]
    return shrunk(model_class(name).config_class or CONFIG_MAPPING[tail])


def shrunk(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A small configuration of this class."""
    special = OVERRIDES.get(kind.model_type, {})
    default = vars(kind())
    known = {**default, **{key: p.default for key, p in inspect.signature(kind).parameters.items()}}
    values: dict[str, Any] = {}
    for key, value in default.items():
        if isinstance(value, PreTrainedConfig):
            values[key] = shrunk(type(value))
        elif key in SIZES and _takes(key, value, SIZES[key]):
            values[key] = SIZES[key]
        elif key.endswith(("_token_id", "_token_index")) and isinstance(value, int | list):
            values[key] = SPECIAL.get(key.split("_")[0], VOCABULARY - 1 - len(values) % 16)
    if "qk_rope_head_dim" in default:  # latent attention: every head has its own key, head_dim follows from others
        values.pop("head_dim", None)
        values["num_key_value_heads"] = values.get("num_attention_heads", ...)
    values |= _layers(default, known)
    values |= special.get("set", {})
    return kind(**{key: copy.deepcopy(value) for key, value in values.items() if value is not ...})


def _takes(key: str, value: Any, size: Any) -> bool:
    return not isinstance(value, bool) and (value is None or isinstance(value, type(size)))


def _layers(default: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """A layer of every type, in the order in which types first appear; lists by layer cut to that length."""
    counts = [key for key in LAYER_COUNTS if isinstance(known.get(key), int)]
    before = {default[key] for key in counts if key in default}
    lists = {key: value for key, value in default.items() if isinstance(value, list) and len(value) in before}
    kinds = {key: list(dict.fromkeys(map(str, value))) for key, value in lists.items() if key in known}
    kinds = {key: distinct for key, distinct in kinds.items() if len(distinct) <= MOST_KINDS}
    layers = max([LAYERS, *(len(distinct) for distinct in kinds.values())])
    values: dict[str, Any] = dict.fromkeys(counts, layers)
    for key, distinct in kinds.items():
        first = [lists[key][list(map(str, lists[key])).index(kind)] for kind in distinct]
        values[key] = [*first, *lists[key]][:layers] if len(first) < layers else first
    return values


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A small random model of an architecture, in evaluation mode, every parameter away from 0 and 1."""
    config = tiny_config(name)
    for part in (config, *(v for v in vars(config).values() if isinstance(v, PreTrainedConfig))):
        part._attn_implementation = "sdpa" if _has_sdpa(name) else "eager"
    torch.manual_seed(0)
    model = model_class(name)(config)
    return randomized(model.to(dtype)).eval().requires_grad_(False)


def _has_sdpa(name: str) -> bool:
    return bool(getattr(model_class(name), "_supports_sdpa", False))


def randomized(model: nn.Module) -> nn.Module:
    """Gains, biases and all other vectors away from 0 and 1; matrices so that products keep their size."""
    generator = torch.Generator().manual_seed(0)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if parameter.ndim < 2:
                values = torch.rand(parameter.shape, generator=generator) + 0.5
                if "bias" in name:
                    values *= torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            else:
                values = torch.randn(parameter.shape, generator=generator)
                if id(parameter) not in embeddings:
                    summed = max(parameter.shape) if parameter.ndim == 3 else parameter[0].numel()
                    values /= summed**0.5
            parameter.copy_(values)
    return model


def example(name: str, model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Keyword arguments of one call."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    given = (OVERRIDES.get(name) or OVERRIDES.get(config.model_type, {})).get("inputs")
    tokens = torch.randint(3, VOCABULARY - 40, (BATCH, TOKENS), generator=generator)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    arguments: dict[str, Any] = {}
    parameters = inspect.signature(model.forward).parameters
    if given is not None:
        arguments |= given(config, tokens, drawn)
    elif "input_ids" in parameters:
        arguments["input_ids"] = tokens
        if config.is_encoder_decoder and "decoder_input_ids" in parameters:
            arguments["decoder_input_ids"] = tokens[:, :7]
    elif "pixel_values" in parameters:
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        arguments["pixel_values"] = drawn(BATCH, config.num_channels, size, size)
    elif "input_values" in parameters:
        arguments["input_values"] = drawn(BATCH, 1600)
    if "use_cache" in parameters or hasattr(config, "use_cache"):
        arguments.setdefault("use_cache", False)
    return {key: value for key, value in arguments.items() if value is not ...}
