"""Everything that needs a GPU, in one command: tests, tiles, benchmark, compute-sanitizer; writes a page and JSON.

    python scripts/gpu.py

Each stage is a process of its own with a time limit, and all of them end within ten minutes. What fails or does not
finish is recorded as that, and the rest goes on. Tiles go to lowering/tiles/<device>.json, where the stages after it
find them, results to docs/benchmarks/<device>.md and .json, as measured, worst rows included.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import gpu_models  # noqa: E402

ROWS = ROOT / "scripts" / "gpu_rows.py"
# Most seconds of each stage, in order. Models have whatever is left, but for the sanitizer behind them.
LIMITS = {"tests": 160.0, "tune": 95.0, "products": 70.0, "norms": 30.0, "models": float("inf"), "sanitizer": 40.0}
STAGES = tuple(LIMITS)
MODELS = ("inductor bf16", "w8a8 int8", "w8a8 fp8", "torchao int8", "torchao fp8")
CASES = ("decode, batch 1", "prefill 2048", "decode, batch 32")  # as of gpu_rows, the most important first
LAST_WORDS = 10.0  # seconds of a stage's limit in which it is asked to end, and may say what it has found
TIMED_OUT = 124
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--out", default=str(ROOT / "docs" / "benchmarks"), help="folder for the page and the JSON")
    parser.add_argument("--seconds", type=float, default=585, help="for all stages (default 585)")
    parser.add_argument("--layers", type=int, default=16, help="of the 8B-shaped model (default 16 of 32, for time)")
    arguments = parser.parse_args(argv)
    if importlib.util.find_spec("torch") is None:
        return _refuse("PyTorch must be installed; this Python has none")
    import torch

    if not torch.cuda.is_available():
        return _refuse("an NVIDIA GPU is needed; torch finds none here")
    if importlib.util.find_spec("qcompile") is None:
        install = [sys.executable, "-m", "pip", "install", "-q", "-e", str(ROOT), "--no-deps", "--no-build-isolation"]
        if subprocess.run(install, check=False).returncode:
            return _refuse(f"qcompile must be installed; {' '.join(install[3:])} failed")
    deadline = time.monotonic() + arguments.seconds
    report: dict[str, Any] = {"machine": machine(), "layers": arguments.layers, "checks": {}, "rows": []}
    for stage in [stage for stage in STAGES if stage in arguments.only]:
        print(f"— {stage}", file=sys.stderr, flush=True)
        run_stage(stage, report, end_of(stage, deadline, arguments.only), arguments.layers)
        write(report, Path(arguments.out))  # after every stage: what is measured is kept
    print(page(report))
    return 1 if report["checks"].get("tests", {}).get("failed") else 0


def _refuse(reason: str) -> int:
    print(f"gpu: {reason}", file=sys.stderr)
    return 2


def end_of(stage: str, deadline: float, stages: Sequence[str]) -> float:
    """When a stage that begins now must end."""
    reserved = LIMITS["sanitizer"] if stage == "models" and "sanitizer" in stages else 0.0
    return min(time.monotonic() + LIMITS[stage], deadline - reserved)


def run_stage(stage: str, report: dict[str, Any], end: float, layers: int) -> None:
    """Run one stage and put what it found into the report."""
    if stage == "tests":
        report["checks"]["tests"] = run_tests(end)
    elif stage == "sanitizer":
        report["checks"]["sanitizer"] = run_sanitizer(end)
    elif stage == "tune":
        seconds = str(end - time.monotonic() - LAST_WORDS)
        report["rows"] += collect([sys.executable, "-P", str(ROWS), "tune", "--seconds", seconds], "tune", end)
        report["checks"]["tiles"] = table_in_use()
    elif stage in ("products", "norms"):
        report["rows"] += collect([sys.executable, "-P", str(ROWS), stage], stage, end)
    else:
        report["rows"] += run_models(end, layers)


def run_models(end: float, layers: int) -> list[Row]:
    """Every variant in a process of its own, side by side."""
    start = [sys.executable, "-P", str(ROWS), "model", "--layers", str(layers), "--variant"]
    return gpu_models.Race({variant: [*start, variant] for variant in MODELS}).run(CASES, layers, end)


def table_in_use() -> Row:
    """Which tiles the stages from here on use."""
    code = (
        "import torch; from qcompile.lowering import tiles; name = torch.cuda.get_device_name(0);"
        "table = tiles.card(name); print('tiles in use:', f'{len(table.rows)} of {tiles.card_path(name).name}, '"
        "f'{table.source}; others heuristic' if table else 'heuristic, none measured on this card')"
    )
    printed = _output([sys.executable, "-P", "-c", code], seconds=60)
    found = re.search(r"tiles in use: (.*)", printed)
    return {"failed": found is None, "summary": found[1] if found else "unknown"}


def run_tests(end: float) -> Row:
    if importlib.util.find_spec("pytest") is None:
        return {"failed": True, "summary": "not run: pytest is not installed"}
    options = ["-v", "--tb=short", "-p", "no:cacheprovider", "-W", "default"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(max(2, min(14, (os.cpu_count() or 4) - 2))), "--dist", "worksteal"]
    command = [sys.executable, "-P", "-m", "pytest", *options, "tests/gpu"]
    # The processes share the cores; a summary's lines are not cut off.
    environment = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2", "COLUMNS": "250"}
    code, printed = _run(command, end, **environment)
    print(printed[-3000:], file=sys.stderr)
    return {"failed": code != 0, **outcome(code, printed)}


def outcome(code: int, printed: str) -> Row:
    """What pytest's output says, also if it was stopped: as they happen, names; in the end, reasons too."""
    names = re.findall(r"^(tests/\S.*?) (?:FAILED|ERROR)\b", printed, re.M)
    names += re.findall(r"^\[gw\d+\] \[ *\d+%\] (?:FAILED|ERROR) (tests/\S.*?) *$", printed, re.M)
    reasons = dict(re.findall(r"^(?:FAILED|ERROR) (tests/\S.*?)(?: - (.*))?$", printed, re.M))
    failures = sorted({f"FAILED {name}" + (f" - {reasons[name]}" if reasons.get(name) else "") for name in names})
    ended = re.findall(r"^=+ (.*(?:passed|failed|error|skipped).*?) =+$", printed, re.M)
    finished = len(re.findall(r"^(?:tests/|\[gw\d).*\b(?:PASSED|FAILED|ERROR|SKIPPED)\b", printed, re.M))
    stopped = f"stopped at its limit, {finished} finished, {len(failures)} of them failed; "
    last = ended[-1] if ended else f"exit {code}"
    return {"summary": (stopped if code == TIMED_OUT else "") + last, "failures": failures}


def run_sanitizer(end: float) -> Row:
    if shutil.which("compute-sanitizer") is None:
        return {"failed": False, "summary": "not run: compute-sanitizer is not installed"}
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "--kernel-name",
               "kernel_substring=_kernel", sys.executable, "-P", str(ROWS), "sanitize"]  # fmt: skip
    code, printed = _run(command, end)
    errors = re.findall(r"ERROR SUMMARY: .*", printed)
    ran = '"ran"' in printed
    return {"failed": code != 0 or not ran, "summary": errors[-1] if errors else f"exit {code}: {printed[-300:]}"}


def _run(command: list[str], end: float, **environment: str) -> tuple[int, str]:
    """Exit status and output of a command. When its time is up it is interrupted, so that pytest says what failed, and
    then killed with all its children, which would keep the output open."""
    if end - time.monotonic() < 1:
        return TIMED_OUT, "out of time"
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **environment}, preexec_fn=_listen,
        )  # fmt: skip
        code = TIMED_OUT
        try:
            code = process.wait(max(0.5, end - LAST_WORDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS)
        _end(process)
        output.seek(0)
        return code, output.read().decode(errors="replace")


def _listen() -> None:
    """In a new process: hear interrupts, which the children of a shell's background jobs do not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: "subprocess.Popen[Any]") -> None:
    """Kill a process that leads a session, and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def collect(command: list[str], name: str, end: float) -> list[Row]:
    """The rows that a stage's process prints until it ends or the time is up; one more says if it did not finish."""
    left = end - time.monotonic()
    if left < 1:
        return [_unfinished(name, "out of time before it began")]
    rows: list[Row] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        overdue = threading.Timer(left, _end, [process])
        overdue.start()
        assert process.stdout is not None
        for line in process.stdout:
            try:
                found = json.loads(line)
            except ValueError:
                continue  # something else printed
            if isinstance(found, dict) and "variant" in found:
                rows.append(found)
        code = process.wait()
        overdue.cancel()
    if code:
        reason = "out of time" if time.monotonic() >= end else f"its process ended with status {code}"
        rows.append(_unfinished(name, reason))
    return rows


def _unfinished(name: str, reason: str) -> Row:
    return {"stage": "unfinished", "name": name, "tokens": 0, "variant": name, "value": None, "error": reason}


def machine() -> Row:
    """What the figures were measured with."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    versions = {name: _version(name) for name in ("torch", "triton", "transformers", "torchao", "qcompile")}
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **versions,
        "commit": _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _output(command: list[str], seconds: float = 20) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
        return done.stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write(report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", report["machine"]["device"].lower()).strip("-")
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(page(report), encoding="utf-8")


def page(report: dict[str, Any]) -> str:
    """The report as Markdown, against the goals."""
    facts = report["machine"]
    lines = [f"# {facts['device']}", "", "Written by `make gpu`, as measured. " + ", ".join(
        f"{name} {value}" for name, value in facts.items() if name != "device") + ".", ""]  # fmt: skip
    for name, check in report["checks"].items():
        lines.append(f"- {name}: {'FAILED, ' if check['failed'] else ''}{check['summary']}")
        lines += [f"  - `{failure}`" for failure in check.get("failures", [])[:20]]
    rows = report["rows"]
    lines += ["", *_tuned(rows), *_products(rows), *_norms(rows), *_models(rows, report["layers"]), *_failures(rows)]
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
    lines = ["## Tiles", "", "How many times faster the tiles measured here are than the heuristic ones, by M.", "",
             f"| product | dtype | {' | '.join(map(str, counts))} |", "|---" * (len(counts) + 2) + "|"]  # fmt: skip
    for name in dict.fromkeys(name for name, tokens in found if tokens):
        for dtype in ("int8", "fp8"):
            gains = [ratio(found.get((name, m), {}), f"heuristic {dtype}", f"tuned {dtype}") for m in counts]
            lines.append(f"| {name} | {dtype} | {' | '.join(judged(gain, 0.0) for gain in gains)} |")
    return [*lines, ""]


def _products(rows: list[Row]) -> list[str]:
    found = values(rows, "products")
    if not found:
        return []
    lines = [
        "## Products", "",
        "Microseconds, and how many times faster than the other. Goals: fp8 ≥ 1.0× `_scaled_mm` rowwise, int8 ≥ 1.3×",
        "`_int_mm` with separate scaling, both ≥ 1.7× bf16 for M ≤ 16, M ≥ 2048. Bold misses. All five in turns.", "",
        "| product | M | int8 | fp8 | bf16 | fp8 : `_scaled_mm` | int8 : `_int_mm` | int8 : bf16 | fp8 : bf16 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for (name, m), measured in found.items():
        over_bf16 = 1.7 if m <= 16 or m >= 2048 else 0.0
        times = [f"{measured[v]:.1f}" if v in measured else "–" for v in ("triton int8", "triton fp8", "bf16 matmul")]
        ratios = [
            judged(ratio(measured, "_scaled_mm fp8", "triton fp8"), 1.0),
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


def _models(rows: list[Row], layers: int) -> list[str]:
    found = values(rows, "models")
    if not found:
        return []
    lines = [f"## Llama of 8B's shape, {layers} of its 32 layers, random weights", "",
             "Milliseconds of a call with CUDA graphs, medians of rounds in which all were timed in turns.",
             "Goals over bf16 Inductor: ≥ 1.7× prefill, ≥ 1.6× decode; ahead of torchao.",
             "", f"| case | {' | '.join(MODELS)} | int8 : bf16 | fp8 : bf16 | int8 : torchao | fp8 : torchao |",
             "|---" * (len(MODELS) + 5) + "|"]  # fmt: skip
    for (case, _), measured in found.items():
        goal = 1.7 if case.startswith("prefill") else 1.6
        cells = [f"{measured[v]:.2f}" if v in measured else "–" for v in MODELS]
        cells += [judged(ratio(measured, "inductor bf16", f"w8a8 {dtype}"), goal) for dtype in ("int8", "fp8")]
        cells += [judged(ratio(measured, f"torchao {dtype}", f"w8a8 {dtype}"), 1.0) for dtype in ("int8", "fp8")]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    lines += ["", "Seconds until a case was compiled and warm, all variants compiling at once:", "",
              f"| case | {' | '.join(MODELS)} |", "|---" * (len(MODELS) + 1) + "|"]  # fmt: skip
    for (case, _), seconds in values(rows, "compile").items():
        lines.append(f"| {case} | {' | '.join(f'{seconds[v]:.0f}' if v in seconds else '–' for v in MODELS)} |")
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


if __name__ == "__main__":
    sys.exit(main())
