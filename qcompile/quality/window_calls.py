"""How a language model is called on windows of tokens, and which tokens its logits are about."""

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.errors import ConfigError
from qcompile.model_limits import without_cache

PROBE = 8  # tokens of the call that only shows that a model can be called


@dataclasses.dataclass(frozen=True)
class WindowCall:
    """arguments: keyword arguments of the call, without a KV cache. read: int64 [count, T], the tokens that the logits
    [count, T, vocabulary] stand at, so that logits[:, :-1] are scored against read[:, 1:]."""

    arguments: dict[str, Any]
    read: Tensor


def window_call(model: nn.Module, ids: Tensor, *, logits: bool = True) -> WindowCall:
    """The call of a model on windows ids [count, size], on the model's device.

    An encoder–decoder model reads the first half of a window in its encoder and the second in its decoder.
    logits: whether anybody reads them; if not, the model is asked for those of one token, where it can be asked.
    """
    ids = ids.to(next(model.parameters()).device)
    arguments: dict[str, Any] = {"input_ids": ids}
    read = ids
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        half = ids.shape[1] // 2
        read = ids[:, half:]
        arguments = {"input_ids": ids[:, :half], "decoder_input_ids": read}
    arguments |= without_cache(model)
    if not logits and "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = 1
    return WindowCall(arguments, read)


def check_callable(model: nn.Module, windows: Tensor) -> None:
    """Call a model on a few tokens of the first window. Raises ConfigError if it cannot be called on tokens alone, or
    windows have nothing to predict."""
    if window_call(model, windows[:1]).read.shape[1] < 2:
        raise ConfigError(
            f"windows must have at least 3 tokens for {type(model).__name__}, which reads half of each in its encoder; "
            f"got {windows.shape[1]}; give a longer --seqlen"
        )
    call = window_call(model, windows[:1, :PROBE])
    try:
        with torch.no_grad():
            model(**call.arguments)
    except Exception as error:  # modeling code may raise anything at an input it was not made for
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"{type(model).__name__} must be callable on tokens alone; it fails ({reason}); "
            "from Python, qcompile.quantize takes batches of any keyword arguments"
        ) from error


def token_logits(output: Any) -> Tensor | None:
    """Logits [count, T, vocabulary] in what a model returned, if it has any."""
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.ndim == 3 else None


def logits_of(model: nn.Module, output: Any) -> Tensor:
    """The same, or ConfigError."""
    logits = token_logits(output)
    if logits is None:
        raise ConfigError(
            f"a model must give logits for every token to be scored; {type(model).__name__} gives none; "
            "use the class with a language-model head"
        )
    return logits
