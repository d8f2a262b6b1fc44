"""Regular expressions of a folder, which a stranger may have written: matching them takes bounded time and memory."""

import math
import re
import time
from typing import Any

import regex

from qcompile.errors import CheckpointError

SECONDS = 5.0  # for all matches of one folder; honest patterns take microseconds each
LARGEST = 10_000  # characters with counted repeats written out, which is what `regex` does with them


class Patterns:
    """Matches, as long as there is time."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = self._left = seconds
        self._compiled: dict[str, Any] = {}

    def match(self, pattern: str, name: str) -> bool:
        """Whether a name begins with what a pattern in `re`'s syntax describes. Raises CheckpointError."""
        began = time.monotonic()
        if pattern not in self._compiled:
            self._compiled[pattern] = _compile(pattern)
        try:
            if self._left <= 0:
                raise TimeoutError
            found = self._compiled[pattern].match(name, timeout=self._left) is not None
        except TimeoutError:
            raise CheckpointError(
                f"patterns in quantization_config must match in {self._seconds:g} s; {_shown(pattern)} does not; "
                "write it without repeats inside repeats"
            ) from None
        self._left -= time.monotonic() - began
        return found


def _compile(pattern: str) -> Any:
    if _written_out(pattern) > LARGEST:
        raise CheckpointError(
            f"a pattern in quantization_config must have at most {LARGEST} characters with its repeats written "
            f"out; {_shown(pattern)} has more; name modules instead"
        )
    try:
        re.compile(pattern)  # what other readers take; `regex` takes more, recursion for one
        return regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"a pattern in quantization_config must be regular; got {_shown(pattern)}: {error}"
        ) from None


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) < 80 else f"{pattern[:80]}…")


def _written_out(pattern: str) -> int:
    """At least the length of a pattern whose repeats {n} are written out."""
    if len(pattern) > LARGEST:
        return len(pattern)
    repeats = (map(int, re.findall("[0-9]+", counts)) for counts in re.findall("{([^{}]*)}", pattern))
    return len(pattern) * math.prod(max(1, *counts, 1) for counts in repeats)
