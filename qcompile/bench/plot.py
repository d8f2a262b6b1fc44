"""A picture of a benchmark: one panel per case, a bar per variant, its quartiles as a whisker."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcompile.atomic_file import check_file, replacing
from qcompile.bench.bench import Timing
from qcompile.errors import ConfigError

KINDS = (".svg", ".png", ".pdf")
OURS = "#2a6f97"
OTHERS = "#a9b4bd"


def write_plot(timings: Sequence[Timing], path: str | Path, ours: str = "w8a8 int8") -> None:
    """Write milliseconds per call of every case and variant; ours is coloured. Raises ConfigError."""
    check_plot(path)
    from matplotlib.figure import Figure

    cases = list(timings[0].seconds)
    figure = Figure(figsize=(7, 0.45 + len(cases) * (0.35 + 0.22 * len(timings))), layout="constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    for case, panel in zip(cases, panels, strict=True):
        _draw(panel, case, timings, ours)
    panels[-1].set_xlabel("milliseconds per call, median and quartiles")
    kind = Path(path).suffix
    with replacing(path) as partial:
        figure.savefig(partial, format=kind[1:], metadata={"Date": None} if kind == ".svg" else None)


def check_plot(path: str | Path) -> None:
    """Raises ConfigError if no picture can be written there."""
    if Path(path).suffix not in KINDS:
        raise ConfigError(f"a plot must be a file ending in {', '.join(KINDS)}; got {path}")
    check_file(path)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("a plot needs matplotlib; install qcompile[bench], or leave out --plot") from None


def _draw(panel: Any, case: str, timings: Sequence[Timing], ours: str) -> None:
    quartiles = [[1e3 * q for q in statistics.quantiles(timing.seconds[case], n=4)] for timing in timings]
    medians = [1e3 * timing.median(case) for timing in timings]
    whiskers = [[m - q[0] for m, q in zip(medians, quartiles, strict=True)],
                [q[2] - m for m, q in zip(medians, quartiles, strict=True)]]  # fmt: skip
    names = [timing.variant for timing in timings]
    colours = [OURS if name == ours else OTHERS for name in names]
    bars = panel.barh(names, medians, xerr=whiskers, color=colours, height=0.7)
    panel.bar_label(bars, [f"{median:.3g}" for median in medians], padding=6, fontsize=8)
    panel.set_title(case, loc="left", fontsize=9)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
