"""A model's structure from its folder, on the meta device: no weight is read, so a 70B model takes a moment."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompile.errors import ConfigError
from qcompile.paths import expanded
from qcompile.quantized_linear import quantized_linears


def load_structure(folder: str, *, trust_remote_code: bool = False) -> Any:
    """The model that a Hugging Face folder (or hub name in the local cache) describes, on the meta device.

    Of a quantized folder the linears are QuantizedLinears, and experts likewise: those that are in 8 bits in its weight
    files, of which the headers are read, or, without such files, those that its config names.
    Raises ConfigError if there is no config there, or transformers knows no such model; CheckpointError if it is
    quantized in another way than W8A8, or its files are broken.
    """
    import transformers

    config, quantization = load_config(folder, trust_remote_code=trust_remote_code)
    listed = getattr(config, "architectures", None)
    name = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""
    kind = getattr(transformers, name, None) if name else None
    with torch.device("meta"):
        try:
            model = (
                kind._from_config(config)
                if kind is not None
                else transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            )
        except Exception as error:  # as above
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ConfigError(f"config.json in {folder} must describe a model; {name} fails: {reason}") from None
    if quantization is not None:
        _make_room(model, quantization, expanded(folder))
    return model.eval().requires_grad_(False)


def load_config(folder: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The transformers config in a folder (or hub name in the local cache), and what it says of quantization, if it is
    quantized. Raises ConfigError."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(expanded(folder), trust_remote_code=trust_remote_code)
        return config, take_quantization(config)
    except Exception as error:  # a config may hold anything; whatever transformers makes of it is the config's fault
        reason = " ".join(str(error).split())[:200]
        where = "" if expanded(folder).exists() else " (no such folder)"
        raise ConfigError(f"MODEL must be a folder with a model's config.json; got {folder}{where}: {reason}") from None


def take_quantization(config: Any) -> Any:
    """What a transformers config says of quantization, taken out of it, since transformers would act on it; None for a
    float model."""
    found = None
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            found = part.quantization_config if found is None else found
            del part.quantization_config
    return found


def _make_room(model: nn.Module, quantization: Any, folder: Path) -> None:
    from qcompile.checkpoint import formats
    from qcompile.checkpoint.folder import inspect
    from qcompile.checkpoint.transformers_quantizer import make_room, spread

    tensors = inspect(folder, checksums=False).tensors if any(folder.glob("*.safetensors")) else None
    make_room(model, formats.read(quantization), tensors)
    for linear in quantized_linears(model).values():
        spread(linear)
