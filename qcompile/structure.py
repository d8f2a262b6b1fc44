"""A model's structure from its folder, on the meta device: no weight is read, so a 70B model takes a moment."""

from typing import Any

import torch

from qcompile.errors import ConfigError
from qcompile.paths import expanded


def load_structure(folder: str, *, trust_remote_code: bool = False) -> Any:
    """The model that a Hugging Face folder (or hub name in the local cache) describes, on the meta device.

    Raises ConfigError if there is no config there, or transformers knows no such model.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(expanded(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # a config may hold anything; whatever transformers makes of it is the config's fault
        reason = str(error).strip().partition("\n")[0]
        where = "" if expanded(folder).exists() else " (no such folder)"
        raise ConfigError(f"MODEL must be a folder with a model's config.json; got {folder}{where}: {reason}") from None
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
    return model.eval().requires_grad_(False)
