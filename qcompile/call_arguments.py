"""Arguments of a call: tensors, plain values, and lists, tuples and dicts of such; moved, cut, and written to files."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

PLAIN = (bool, int, float, str, type(None))
LONGEST = 32  # tokens kept of a call; enough to capture the graph again


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same value with each tensor replaced. Objects of other classes, such as caches, stay the same objects."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) is dict:
        return {key: map_tensors(function, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor of a value, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, value)
    return found


def short_copy(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A call to capture a model with: where all tensors are tokens or masks of tokens, [batch, tokens], their first
    row cut to 32 tokens, else everything whole, since images go with the tokens that stand for them. Copies tensors."""
    tensors = tensors_in(dict(arguments))
    of_tokens = {tensor.shape for tensor in tensors if not tensor.is_floating_point()}
    can_be_cut = all(tensor.ndim == 2 and tensor.shape in of_tokens for tensor in tensors)

    def copy(tensor: Tensor) -> Tensor:
        return (tensor[:1, :LONGEST] if can_be_cut else tensor).detach().clone()

    copied: dict[str, Any] = map_tensors(copy, dict(arguments))
    return copied


def kind_of(value: Any) -> Any:
    """What tells calls apart that may take different paths through a model: plain values, and where others are."""
    if isinstance(value, PLAIN):
        return repr(value)
    if type(value) is dict:
        return frozenset((key, kind_of(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value), tuple(map(kind_of, value))
    return type(value)


def is_storable(value: Any) -> bool:
    """Whether a file can hold a value."""
    if type(value) is dict:
        return all(isinstance(key, str) and is_storable(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(map(is_storable, value))
    return isinstance(value, (*PLAIN, Tensor))


def to_plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A storable value as JSON has it; its tensors go to `tensors`, under the names that stand for them."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if type(value) is dict:
        return {"dict": {key: to_plain(item, tensors) for key, item in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [to_plain(item, tensors) for item in value]}
    return value


def from_plain(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `to_plain` was given. Raises KeyError, TypeError or ValueError if it never made that."""
    if not isinstance(plain, dict):
        if not isinstance(plain, PLAIN):
            raise TypeError(f"a value must be plain; got {plain!r:.80}")
        return plain
    (kind, content), = plain.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: from_plain(item, tensors) for key, item in dict(content).items()}
    return {"list": list, "tuple": tuple}[kind](from_plain(item, tensors) for item in content)
