"""What `qcompile bench --json` measured, as data for the report."""

import json
import math
from pathlib import Path
from typing import Any

from qcompile.bench.bench import Timing
from qcompile.errors import ConfigError
from qcompile.paths import expanded


def read_bench(path: str | Path) -> dict[str, Any]:
    """machine: [name, value]s; cases, variants; milliseconds: per case the median of every variant; memory: peak MiB of
    every variant; roofline: as the file has it, or None. Raises ConfigError."""
    try:
        whole = json.loads(expanded(path).read_text(encoding="utf-8"))
        timings = [Timing(**values) for values in whole["timings"]]
        cases = list(timings[0].seconds)
        return {
            "machine": [(str(name), str(value)) for name, value in whole["machine"].items()],
            "variants": [str(timing.variant) for timing in timings],
            "cases": cases,
            "milliseconds": [[timing.median(case) * 1e3 for timing in timings] for case in cases],
            "memory": [timing.peak_memory / 2**20 for timing in timings],
            "roofline": _roofline(whole.get("roofline")),
        }
    except OSError as error:
        raise ConfigError(f"the bench file must be readable; {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(f"{path} must be what `qcompile bench --json` printed; {reason}") from None


def _roofline(found: Any) -> dict[str, Any] | None:
    """Peaks, and points: name, operations per byte, operations per second."""
    if found is None:
        return None
    bandwidth, peak = float(found["bytes_per_second"]), float(found["operations_per_second"])
    points = [(str(p["name"]), float(p["intensity"]), float(p["operations_per_second"])) for p in found["points"]]
    numbers = [bandwidth, peak, *(value for _, *pair in points for value in pair)]
    if not all(math.isfinite(value) and value > 0 for value in numbers):
        raise ValueError("a roofline must be of positive numbers")
    return {"bandwidth": bandwidth, "peak": peak, "points": points}
