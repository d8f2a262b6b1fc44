"""Activation statistics: recorded by observers, kept in a file, matched to the weights they belong to."""

import dataclasses
import functools
import json
import warnings
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Protocol

import safetensors
import torch
from torch import Tensor

from qcompile import call_arguments, names
from qcompile.atomic_file import replacing
from qcompile.checkpoint import safetensors_writer
from qcompile.errors import CalibrationError
from qcompile.ops import column_absmax
from qcompile.paths import expanded

Field = Literal["absmax", "rows"]
FORMAT = "qcompile-calibration-4"
SAMPLE = 64
RESTARTS = 8
# A sample taken in float32 still matches the same weights in bf16: one rounding, 2^-8 relative, doubled.
SAMPLE_TOLERANCE = 2**-7


class StatisticOf(Protocol):
    """What is known of the activations that meet a weight of that name: absmax [K] or rows [R, K], as recorded."""

    def __call__(self, weight: Tensor, name: str, field: Field, /) -> Tensor: ...


def as_input(statistic: Tensor, weight: Tensor) -> Tensor:
    """A statistic as graphs read it: float32, on the weight's device."""
    return statistic.to(weight.device, torch.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Statistic:
    """What calibration saw at the input of the linears of one weight.

    absmax: per-channel absolute maximum [K] float32. rows: rows of the input [R, K] in its dtype, evenly drawn from all
    calls, on which quantized products are compared. sample: what the weight is recognised by (see `sample`).
    """

    absmax: Tensor
    rows: Tensor
    sample: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics by weight name, and what they were taken from.

    example: one call's keyword arguments, from which the graph can be captured again: tensors, plain values (flags,
    numbers, text), lists, tuples and dicts of them; empty if there were other ones. kinds: how many kinds of call, with
    different arguments, were recorded.
    """

    statistics: Mapping[str, Statistic]
    batches: int
    tokens: int
    example: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kinds: int = 1

    def __deepcopy__(self, memo: object) -> "Calibration":
        """Itself: it is immutable, and copies (transformers deep-copies options) would be taken for other data."""
        return self

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file, complete or not at all. Raises CalibrationError."""
        tensors = {f"absmax/{name}": s.absmax.cpu() for name, s in self.statistics.items()}
        tensors |= {f"rows/{name}": s.rows.cpu() for name, s in self.statistics.items()}
        tensors |= {f"sample/{name}": s.sample.cpu() for name, s in self.statistics.items()}
        arguments: dict[str, Tensor] = {}
        example = {name: call_arguments.to_plain(value, arguments) for name, value in self.example.items()}
        tensors |= {f"example/{name}": value.cpu() for name, value in arguments.items()}
        plain = {"batches": self.batches, "tokens": self.tokens, "example": example, "kinds": self.kinds}
        metadata = {"format": FORMAT, "plain": json.dumps(plain)}
        with replacing(path, CalibrationError) as partial:
            safetensors_writer.write(partial, tensors, metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Calibration":
        """Read what `save` wrote. Raises CalibrationError for anything else."""
        try:
            with safetensors.safe_open(expanded(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise CalibrationError(f"no calibration file at {path}; make one with Calibration.save") from None
        except (OSError, safetensors.SafetensorError) as error:
            raise CalibrationError(f"{path} is no readable safetensors file: {error}; record it again") from None
        if metadata.get("format") != FORMAT:
            raise CalibrationError(
                f"{path} is no calibration file (format {metadata.get('format')!r}, needed {FORMAT!r}); "
                "make one with Calibration.save"
            )
        arguments = {key.removeprefix("example/"): t for key, t in tensors.items() if key.startswith("example/")}
        statistics = _statistics(tensors, path)
        try:
            plain = json.loads(metadata["plain"])
            call = plain.pop("example").items()
            example = {name: call_arguments.from_plain(value, arguments) for name, value in call}
            return cls(statistics, example=example, **plain)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            raise CalibrationError(f"{path} must say what was recorded; its header does not; record it again") from None

    def statistic(self, weight: Tensor, name: str, field: Field) -> Tensor:
        """absmax [K] or rows [R, K] for a weight of the model, known there as `name`. Raises CalibrationError."""
        found: Tensor = getattr(self._entry(weight, name), field)
        return found

    def _entry(self, weight: Tensor, name: str) -> Statistic:
        values = sample(weight)  # reads the whole weight, so once
        found = self.statistics.get(name)
        if found is not None and _recognises(found, values):
            return found
        tails = [s for key, s in self.statistics.items() if _same_tail(key, name)]
        for candidates in (tails, self.statistics.values()):
            matching = [s for s in candidates if _recognises(s, values)]
            if len(matching) == 1:
                return matching[0]
        raise CalibrationError(
            f"the calibration does not belong to this model: for {name} it {self._lacks(name, values)}; calibrate this "
            "model, or list in ignore what changes from call to call"
        )

    def _lacks(self, name: str, values: Tensor) -> str:
        if sum(_recognises(statistic, values) for statistic in self.statistics.values()) > 1:
            return "has several weights that look like this one, and none of its name"
        return "was recorded on other weights" if name in self.statistics else "has no such weight"


def _statistics(tensors: dict[str, Tensor], path: object) -> dict[str, Statistic]:
    keys = [key.removeprefix("absmax/") for key in tensors if key.startswith("absmax/")]
    fields = [field.name for field in dataclasses.fields(Statistic)]
    if not keys or any(f"{field}/{key}" not in tensors for key in keys for field in fields):
        raise CalibrationError(f"{path} holds no complete statistics; record it again")
    return {key: Statistic(*(tensors[f"{field}/{key}"] for field in fields)) for key in keys}


def _same_tail(left: str, right: str) -> bool:
    return left.endswith("." + right) or right.endswith("." + left)


def sample(weight: Tensor) -> Tensor:
    """What a weight is recognised by, float32: up to 64 evenly spaced values, and the absmax of every column, so that
    scaling any one of them shows. A copy: it must not follow the weight's changes."""
    flat = weight.detach().reshape(-1)
    # Ends included: a step of numel / 64 would be a whole number of rows, and every sample from the first column.
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLE, flat.numel()), dtype=torch.float64).long()
    columns = column_absmax(weight.detach().reshape(-1, weight.shape[-1]))
    return torch.cat([flat[index.to(flat.device)], columns]).to("cpu", torch.float32)


def _recognises(statistic: Statistic, values: Tensor) -> bool:
    """Whether a weight with this sample is the one that was recorded."""
    if values.shape != statistic.sample.shape:
        return False
    return torch.allclose(values, statistic.sample, rtol=SAMPLE_TOLERANCE, atol=1e-7)


@dataclasses.dataclass
class _Entry:
    weight: "weakref.ref[Tensor]"
    stamp: tuple[int, int]
    absmax: Tensor
    rows: Tensor
    calls: int
    uses: int
    restarts: int  # in a row, each after one call


class Recorder:
    """Running per-channel maxima, by weight. Weights that change in place start again."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def record(self, weight: Tensor, absmax: Tensor, rows: Tensor, *, new_call: bool = True) -> None:
        """Take observations [K] and [R, K] for a weight [N, K]. new_call: this is no further use in the same call.
        Raises CalibrationError if they are not finite."""
        self.record_siblings([weight], absmax, rows, again=() if new_call else (id(weight),))

    def record_siblings(
        self, weights: Sequence[Tensor], absmax: Tensor, rows: Tensor, *, again: Collection[int] = ()
    ) -> None:
        """As `record`, for linears that read one tensor: what is kept for them is kept once. again: ids of the weights
        that were recorded in the same call before."""
        if not bool(torch.isfinite(absmax).all()):
            name = names.name_of(weights[0]) or "an unnamed weight"
            raise CalibrationError(
                f"calibration activations must be finite; the input of {name} has NaN or Inf; check the data and "
                "the model's dtype"
            )
        seen = set(again)
        merged: dict[int, tuple[Tensor, Tensor]] = {}
        for weight in weights:
            entry = self._entry(weight)
            if entry is not None and entry.absmax.shape != absmax.shape:
                raise CalibrationError(
                    f"statistics are kept by parameter; {names.name_of(weight) or 'one'} serves linears with "
                    f"{len(entry.absmax)} and {len(absmax)} inputs, in graphs of their own; list it in ignore"
                )
            key = 0 if entry is None else id(entry.rows)
            if key not in merged:
                merged[key] = _merge(entry, absmax, rows)
            calls, uses = (0, 0) if entry is None else (entry.calls, entry.uses)
            calls += id(weight) not in seen or not calls
            seen.add(id(weight))
            restarts = entry.restarts if entry is not None else self._restarts(weight)
            reference = weakref.ref(weight, functools.partial(_forget, self._entries, id(weight)))
            self._entries[id(weight)] = _Entry(reference, _stamp(weight), *merged[key], calls, uses + 1, restarts)

    def _entry(self, weight: Tensor) -> _Entry | None:
        entry = self._entries.get(id(weight))
        if entry is None or entry.weight() is not weight or entry.stamp != _stamp(weight):
            return None
        return entry

    def _restarts(self, weight: Tensor) -> int:
        """How often recording has begun again, now that it does; says once that it may never end."""
        before = self._entries.get(id(weight))
        if before is None or before.weight() is not weight or before.calls > 1:
            return 0
        if before.restarts + 1 == RESTARTS:
            name = names.name_of(weight) or "an unnamed weight"
            warnings.warn(
                f"{name} changes from call to call, and so its calibration never ends; list its linear in ignore",
                stacklevel=2,
            )
        return before.restarts + 1

    def calls(self, weight: Tensor) -> int:
        """How many calls have been recorded for a weight as it is now."""
        entry = self._entry(weight)
        return entry.calls if entry else 0

    def statistic(self, weight: Tensor, name: str, field: Field) -> Tensor:
        """absmax [K] or rows [R, K] recorded for a weight. Raises CalibrationError."""
        entry = self._entry(weight)
        if entry is None:
            raise CalibrationError(f"no activations were recorded for {name}; calibrate with data that reaches it")
        found: Tensor = getattr(entry, field)
        return found

    def statistics(self) -> dict[str, Statistic]:
        """Everything recorded, by the names of the weights."""
        found = {}
        for entry in self._entries.values():
            weight = entry.weight()
            name = None if weight is None else names.name_of(weight)
            if weight is not None and name is not None:
                found[name] = Statistic(entry.absmax.cpu(), entry.rows.cpu(), sample(weight))
        return found


def statistic_for(
    source: Calibration | Recorder, activations: str, weight: Tensor, name: str, field: Field
) -> Tensor:
    """What `source` knows of the activations that meet a weight, enough for scales per token or static ones. Raises
    CalibrationError."""
    found = source.statistic(weight, name, field)
    if activations == "static" and field == "absmax" and not bool(found.any()):
        raise CalibrationError(
            f"static activations need a range; calibration saw only zeros at {name}; calibrate with data that "
            "reaches it, or ignore it"
        )
    return found


def _merge(entry: _Entry | None, absmax: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What is known after one more use."""
    if entry is None:
        return absmax.detach().clone(), rows.detach().clone()
    taken = _replaced(entry.uses + 1, len(rows)).to(rows.device)
    return torch.maximum(entry.absmax, absmax), torch.where(taken, rows, entry.rows)


def _replaced(use: int, rows: int) -> Tensor:
    """Which rows [R, 1] the given use takes over: each with probability 1/use, so that in the end every use has had
    the same chance at every row. Seeded: equal data gives equal statistics."""
    generator = torch.Generator().manual_seed(use)
    return torch.rand(rows, 1, generator=generator) < 1 / use


def _forget(entries: dict[int, _Entry], key: int, _: object) -> None:
    """What happens when a weight dies."""
    entries.pop(key, None)


def _stamp(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), version_of(tensor)


def version_of(tensor: Tensor) -> int:
    """Counts in-place writes; inference tensors keep no count and cannot be written outside inference mode."""
    return -1 if tensor.is_inference() else tensor._version


def keyword_arguments(model: torch.nn.Module, batch: object) -> dict[str, Any]:
    """A calibration batch as keyword arguments. Raises CalibrationError."""
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, Sequence) and batch and all(isinstance(item, int) for item in batch):
        return {"input_ids": torch.tensor([batch])}
    raise CalibrationError(
        f"a calibration batch must be a tensor of input_ids or a dict of keyword arguments; "
        f"got {type(batch).__name__} for {type(model).__name__}"
    )


def count_tokens(arguments: Mapping[str, Any]) -> int:
    """Positions in a batch: the size of its integer input, or of its first tensor without the channels."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    if not tensors:
        return 0
    whole = next((t for t in tensors if not t.is_floating_point()), None)
    return whole.numel() if whole is not None else tensors[0].shape[:-1].numel()


def summary(calibration: Calibration) -> str:
    """One JSON line of what a calibration holds."""
    return json.dumps(
        {
            "weights": len(calibration.statistics),
            "batches": calibration.batches,
            "tokens": calibration.tokens,
        }
    )


Batches = Iterable[Tensor | Mapping[str, Any]]
