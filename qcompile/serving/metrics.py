"""Counters and gauges in Prometheus' text format. Written by the event loop alone, so there are no locks."""

import collections
import time

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
HELP = {
    "qcompile_requests_total": "Answers by endpoint and status",
    "qcompile_prompt_tokens_total": "Tokens of accepted prompts",
    "qcompile_generated_tokens_total": "Tokens generated",
    "qcompile_finished_total": "Sequences by how they ended",
}


class Metrics:
    """What a server counts."""

    def __init__(self) -> None:
        self._counts: collections.Counter[tuple[str, tuple[tuple[str, str], ...]]] = collections.Counter()
        self._first_buckets = [0] * (len(BUCKETS) + 1)
        self._first_sum = 0.0
        self.started = time.time()

    def add(self, name: str, amount: int = 1, **labels: str) -> None:
        """Count something; its name must be in HELP."""
        self._counts[name, tuple(sorted(labels.items()))] += amount

    def first_token(self, seconds: float) -> None:
        """A sequence got its first token so long after its request."""
        at = next((i for i, bound in enumerate(BUCKETS) if seconds <= bound), len(BUCKETS))
        self._first_buckets[at] += 1
        self._first_sum += seconds

    def text(self, **gauges: float) -> str:
        """Everything, with gauges of this moment."""
        lines = []
        for name, explained in HELP.items():
            lines += [f"# HELP {name} {explained}", f"# TYPE {name} counter"]
            found = {labels: value for (key, labels), value in self._counts.items() if key == name}
            for labels, value in sorted(found.items()):
                inside = ",".join(f'{key}="{text}"' for key, text in labels)
                lines.append(f"{name}{{{inside}}} {value}" if inside else f"{name} {value}")
        name, total = "qcompile_first_token_seconds", 0
        lines += [f"# HELP {name} From request to first token", f"# TYPE {name} histogram"]
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self._first_buckets, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        lines += [f"{name}_sum {self._first_sum:.6f}", f"{name}_count {total}"]
        for gauge, level in gauges.items():
            lines += [f"# TYPE qcompile_{gauge} gauge", f"qcompile_{gauge} {level:g}"]
        return "\n".join(lines) + "\n"
