"""The page that `scripts/gpu.py` makes of its report: every figure beside its goal."""

from typing import Any

from gpu_models import AT_ONCE, MODELS, WAITED

Row = dict[str, Any]


def page(report: dict[str, Any]) -> str:
    """The report as Markdown, against the goals."""
    facts = report["machine"]
    lines = [f"# {facts['device']}", "", "Written by `make gpu`, as measured. " + ", ".join(
        f"{name} {value}" for name, value in facts.items() if name != "device") + ".", ""]  # fmt: skip
    for part, measured in report["parts"].items():
        if other := [f"{name} {value}" for name, value in measured.items() if value != facts.get(name)]:
            lines.append(f"- {part}: measured at {', '.join(other)}")
    for name, check in report["checks"].items():
        lines.append(f"- {name}: {'FAILED, ' if check['failed'] else ''}{check['summary']}")
        lines += [f"  - `{failure}`" for failure in check.get("failures", [])[:20]]
    rows = report["rows"]
    lines += ["", *_tuned(rows), *_products(rows), *_norms(rows), *_models(rows), *_failures(rows)]
    return "\n".join(lines).rstrip() + "\n"


def values(rows: list[Row], stage: str) -> dict[tuple[str, int], dict[str, float]]:
    """{(name, tokens): {variant: value}} of the rows that have one."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if row["stage"] == stage:
            found.setdefault((row["name"], row["tokens"]), {})
            if row["value"] is not None:
                found[row["name"], row["tokens"]][row["variant"]] = row["value"]
    return found


def ratio(measured: dict[str, float], other: str, ours: str) -> float | None:
    """How many times faster ours is; None if one was not measured."""
    return measured[other] / measured[ours] if other in measured and ours in measured else None


def judged(value: float | None, goal: float) -> str:
    """A ratio, bold if it misses its goal."""
    if value is None:
        return "–"
    return f"{value:.2f}×" if value >= goal else f"**{value:.2f}×**"


def _tuned(rows: list[Row]) -> list[str]:
    found = values(rows, "tune")
    counts = sorted({tokens for _, tokens in found if tokens})
    if not counts:
        return []
    lines = ["## Tiles", "", "How many times faster the tiles measured here are than the heuristic ones, by M. Where",
             "cuBLAS is faster still it has the product, and the best of our kernels is in brackets.", "",
             f"| product | dtype | {' | '.join(map(str, counts))} |", "|---" * (len(counts) + 2) + "|"]  # fmt: skip
    for name in dict.fromkeys(name for name, tokens in found if tokens):
        for dtype in ("int8", "fp8"):
            cells = [_gain(found.get((name, m), {}), dtype) for m in counts]
            lines.append(f"| {name} | {dtype} | {' | '.join(cells)} |")
    return [*lines, ""]


def _gain(measured: dict[str, float], dtype: str) -> str:
    own = ratio(measured, f"heuristic {dtype}", f"own {dtype}")
    gain = judged(ratio(measured, f"heuristic {dtype}", f"tuned {dtype}"), 0.0)
    return gain if own is None else f"{gain} ({own:.2f}×)"


def _products(rows: list[Row]) -> list[str]:
    found = values(rows, "products")
    if not found:
        return []
    lines = [
        "## Products", "",
        "Microseconds, and how many times faster than the other. Goals: fp8 ≥ 1.0× `_scaled_mm` rowwise, int8 ≥ 1.3×",
        "`_int_mm` with separate scaling, both ≥ 1.7× bf16 for M ≤ 16, M ≥ 2048. Bold misses. All five in turns.",
        "\"same\": the tiles have cuBLAS compute it, which is what `_scaled_mm` is.", "",
        "| product | M | int8 | fp8 | bf16 | fp8 : `_scaled_mm` | int8 : `_int_mm` | int8 : bf16 | fp8 : bf16 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    by_cublas = {(row["name"], row["tokens"]) for row in rows if row.get("cublas")}
    for (name, m), measured in found.items():
        over_bf16 = 1.7 if m <= 16 or m >= 2048 else 0.0
        times = [f"{measured[v]:.1f}" if v in measured else "–" for v in ("triton int8", "triton fp8", "bf16 matmul")]
        ratios = [
            "same" if (name, m) in by_cublas else judged(ratio(measured, "_scaled_mm fp8", "triton fp8"), 1.0),
            judged(ratio(measured, "_int_mm + scales", "triton int8"), 1.3),
            judged(ratio(measured, "bf16 matmul", "triton int8"), over_bf16),
            judged(ratio(measured, "bf16 matmul", "triton fp8"), over_bf16),
        ]
        lines.append(f"| {name} | {m} | {' | '.join(times + ratios)} |")
    return [*lines, ""]


def _norms(rows: list[Row]) -> list[str]:
    found, products = values(rows, "norms"), values(rows, "products")
    if not found:
        return []
    lines = ["## Norm and quantize", "",
             "Microseconds of one kernel; what quantizing adds, as a share of the qkv product's time.",
             "Goal: ≤ 5% for M ≥ 1024.", "", "| width of | M | norm | + int8 | + fp8 | int8 adds | fp8 adds |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for (name, m), measured in found.items():
        cells = [f"{measured[v]:.1f}" if v in measured else "–" for v in
                 ("norm bf16", "norm + quantize int8", "norm + quantize fp8")]  # fmt: skip
        for dtype in ("int8", "fp8"):
            product = products.get((f"{name} qkv", m), {}).get(f"triton {dtype}")
            with_quantize = measured.get(f"norm + quantize {dtype}")
            if product is None or with_quantize is None or "norm bf16" not in measured:
                cells.append("–")
                continue
            share = (with_quantize - measured["norm bf16"]) / product
            cells.append(f"{share:.1%}" if share <= 0.05 or m < 1024 else f"**{share:.1%}**")
        lines.append(f"| {name} | {m} | {' | '.join(cells)} |")
    return [*lines, ""]


def _models(rows: list[Row]) -> list[str]:
    lines: list[str] = []
    for layers in sorted({row["tokens"] for row in rows if row["stage"] == AT_ONCE}):
        some = [row for row in rows if row["tokens"] == layers]
        lines += [f"## Llama of 8B's shape, {layers} of its 32 layers, random weights", "",
                  "Milliseconds of a call with CUDA graphs, calls that follow each other at once; medians of rounds in",
                  "which all were timed in turns. Goals over bf16 Inductor: ≥ 1.7× prefill, ≥ 1.6× decode; ahead of",
                  "torchao.", "", *_race(some, AT_ONCE)]  # fmt: skip
        if any(row["stage"] == WAITED for row in some):
            lines += ["The same with a wait for every call, as where a token is looked at before the next: what Python",
                      "and the launch take before the GPU begins is in it.", "", *_race(some, WAITED)]  # fmt: skip
        if seconds := values(some, "compile"):
            each = [f"{case}: {', '.join(f'{took[v]:.0f}' if v in took else '–' for v in MODELS)}"
                    for (case, _), took in seconds.items()]  # fmt: skip
            lines += [f"Seconds until compiled and warm, all at once, in this order: {'; '.join(each)}.", ""]
    return lines


def _race(rows: list[Row], way: str) -> list[str]:
    """Every case in one way of timing it."""
    lines = [f"| case | {' | '.join(MODELS)} | int8 : bf16 | fp8 : bf16 | int8 : torchao | fp8 : torchao |",
             "|---" * (len(MODELS) + 5) + "|"]  # fmt: skip
    for (case, _), measured in values(rows, way).items():
        goal = 1.7 if case.startswith("prefill") else 1.6
        cells = [f"{measured[v]:.2f}" if v in measured else "–" for v in MODELS]
        cells += [judged(ratio(measured, "inductor bf16", f"w8a8 {dtype}"), goal) for dtype in ("int8", "fp8")]
        cells += [judged(ratio(measured, f"torchao {dtype}", f"w8a8 {dtype}"), 1.0) for dtype in ("int8", "fp8")]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return [*lines, ""]


def _failures(rows: list[Row]) -> list[str]:
    failed: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row["error"]:
            key = row["stage"], row["variant"], row["error"]
            failed[key] = failed.get(key, 0) + 1
    if not failed:
        return []
    return ["## Not measured", "", *(
        f"- {stage}, {variant}: {count} rows, {error}" for (stage, variant, error), count in failed.items()
    )]  # fmt: skip
