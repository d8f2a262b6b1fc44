"""Everything that needs a GPU, in one command: tests, tiles, benchmark, compute-sanitizer; writes a page and JSON.

    python scripts/gpu.py

Each stage is a process of its own with a time limit, and all of them end within ten minutes. What fails or does not
finish is recorded as that, and the rest goes on. Tiles go to lowering/tiles/<device>.json, where the stages after it
find them, results to docs/benchmarks/<device>.md and .json, as measured, worst rows included. With --only, what is
there of other stages (and of models with other numbers of layers) stays, and the page says of which commit it is.
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
import gpu_page  # noqa: E402

ROWS = ROOT / "scripts" / "gpu_rows.py"
# Most seconds of each stage, in order. Models have whatever is left, but for the sanitizer behind them.
LIMITS = {"tests": 160.0, "tune": 95.0, "products": 70.0, "norms": 30.0, "models": float("inf"), "sanitizer": 40.0}
STAGES = tuple(LIMITS)
LAST_WORDS = 10.0  # seconds of a stage's limit in which it is asked to end, and may say what it has found
TIMED_OUT = 124
# With what a part of a record was measured.
VERSIONS = ("commit", "date", "driver", "cuda", "torch", "triton", "transformers", "torchao")
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--out", default=str(ROOT / "docs" / "benchmarks"), help="folder for the page and the JSON")
    parser.add_argument("--seconds", type=float, default=585, help="for all stages (default 585)")
    parser.add_argument("--layers", type=int, default=16, help="of the 8B-shaped model (default 16 of 32, for time)")
    quoted = ", ".join(f"'{variant}'" for variant in gpu_models.MODELS)
    parser.add_argument("--variants", nargs="+", choices=gpu_models.MODELS, default=gpu_models.MODELS, metavar="NAME",
                        help=quoted)  # fmt: skip
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
    report = begin(Path(arguments.out), machine(), arguments.only)
    for stage in [stage for stage in STAGES if stage in arguments.only]:
        print(f"— {stage}", file=sys.stderr, flush=True)
        renew(report, stage, arguments, *run_stage(stage, end_of(stage, deadline, arguments.only), arguments))
        write(report, Path(arguments.out))  # after every stage: what is measured is kept
    print(gpu_page.page(report))
    return 1 if "tests" in arguments.only and report["checks"]["tests"]["failed"] else 0


def _refuse(reason: str) -> int:
    print(f"gpu: {reason}", file=sys.stderr)
    return 2


def begin(folder: Path, facts: Row, stages: Sequence[str]) -> dict[str, Any]:
    """The report to fill: empty, or, if not all stages run, what an earlier run on such a device has left."""
    report: dict[str, Any] = {"machine": facts, "parts": {}, "checks": {}, "rows": []}
    path = folder / f"{name_of(facts)}.json"
    if set(stages) != set(STAGES) and path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            return {"machine": facts, **{key: old[key] for key in ("parts", "checks", "rows")}}
        except (ValueError, KeyError, TypeError) as error:
            print(f"gpu: {path} is not kept, no record of this script: {type(error).__name__}", file=sys.stderr)
    return report


def renew(
    report: dict[str, Any], stage: str, arguments: argparse.Namespace, rows: list[Row], checks: dict[str, Row]
) -> None:
    """Put what a stage has found in the place of what it found before."""
    layers, variants = arguments.layers, arguments.variants

    def is_old(row: Row) -> bool:
        if row["stage"] in (gpu_models.AT_ONCE, gpu_models.WAITED, "compile"):
            return stage == "models" and row["tokens"] == layers and row["variant"] in variants
        return bool(stage == (row["name"] if row["stage"] == "unfinished" else row["stage"]))

    report["rows"] = [row for row in report["rows"] if not is_old(row)] + rows
    report["checks"].pop(stage, None)
    report["checks"] |= checks
    facts = {key: report["machine"].get(key) for key in VERSIONS}
    names = [f"models, {layers} layers, {variant}" for variant in variants] if stage == "models" else [stage]
    report["parts"] |= dict.fromkeys(names, facts)


def end_of(stage: str, deadline: float, stages: Sequence[str]) -> float:
    """When a stage that begins now must end."""
    reserved = LIMITS["sanitizer"] if stage == "models" and "sanitizer" in stages else 0.0
    return min(time.monotonic() + LIMITS[stage], deadline - reserved)


def run_stage(stage: str, end: float, arguments: argparse.Namespace) -> tuple[list[Row], dict[str, Row]]:
    """Run one stage: its rows, and what it checked."""
    if stage == "tests":
        return [], {"tests": run_tests(end)}
    if stage == "sanitizer":
        return [], {"sanitizer": run_sanitizer(end)}
    if stage == "tune":
        seconds = str(end - time.monotonic() - LAST_WORDS)
        rows = collect([sys.executable, "-P", str(ROWS), "tune", "--seconds", seconds], "tune", end)
        return rows, {"tiles": table_in_use()}
    if stage in ("products", "norms"):
        return collect([sys.executable, "-P", str(ROWS), stage], stage, end), {}
    return run_models(end, arguments.layers, arguments.variants), {}


def run_models(end: float, layers: int, variants: Sequence[str]) -> list[Row]:
    """Every variant in processes of its own, side by side."""
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory
    race = gpu_models.Race(gpu_models.processes(variants, layers, memory))
    return race.run(tuple(gpu_models.CASES), layers, end)


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
        options += ["-n", str(max(2, min(14, (os.cpu_count() or 4) - 2))), "--dist", "load"]
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
    name = name_of(report["machine"])
    for path, text in (
        (folder / f"{name}.json", json.dumps(report, indent=1) + "\n"), (folder / f"{name}.md", gpu_page.page(report)),
    ):  # fmt: skip
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


def name_of(facts: Row) -> str:
    """The record's name, of a device's."""
    return re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
