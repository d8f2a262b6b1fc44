"""What was done to a model when it was quantized: kept on the model, in its folder, and in its model card."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from qcompile.config import Config
from qcompile.rewrite import Refusal
from qcompile.strict_json import to_json


@dataclasses.dataclass(frozen=True)
class Record:
    """dtype, activations, alpha, clip: as in Config. batches, tokens: what calibration saw, of `source`.

    kept: linears that stay in float, and why. unsmoothed: quantized linears whose input nothing could absorb a scale
    of, and why. model: hub name or folder name of what was quantized. quality: figures measured afterwards.
    """

    dtype: str
    activations: str
    alpha: float | str | None
    clip: str
    batches: int
    tokens: int
    kept: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unsmoothed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    model: str = ""
    source: str = ""
    quality: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, config: Config, placeless: Mapping[str, str], refusals: Sequence[Refusal], unseen: Mapping[str, str]
    ) -> "Record":
        """The record of a run: its options, what the passes left alone, and what they did not see."""
        assert config.calibration is not None
        kept: dict[str, str] = {}
        unsmoothed: dict[str, str] = {}
        for refusal in refusals:
            name, _, reason = refusal.reason.partition(": ")
            if refusal.rule == "find_linears":
                kept[name] = placeless.get(name, reason)
            elif refusal.rule == "smooth":
                unsmoothed[name] = reason
        calibration = config.calibration
        return cls(
            config.dtype, config.activations, config.alpha, config.clip, calibration.batches, calibration.tokens,
            {**kept, **unseen}, unsmoothed,
        )  # fmt: skip

    def to_json(self) -> str:
        return to_json(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Record":
        """Read what `to_json` wrote; fields of other versions are left out. Raises TypeError if one is missing."""
        known = {field.name for field in dataclasses.fields(cls)}
        found = cls(**{name: value for name, value in values.items() if name in known})
        quality = {name: math.nan if value is None else value for name, value in {**found.quality}.items()}
        return dataclasses.replace(found, quality=quality)


def by_reason(found: Mapping[str, str], quote: str = "") -> list[tuple[str, str]]:
    """Names of linears as text, and the reason that they share: up to three of them, or one and how many more."""
    reasons: dict[str, list[str]] = {}
    for name, reason in found.items():
        reasons.setdefault(reason, []).append(f"{quote}{name}{quote}")
    return [
        (", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more", reason)
        for reason, names in reasons.items()
    ]
