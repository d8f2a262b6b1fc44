"""Measures every architecture, each in a process that may crash or hang, and writes docs/architectures.md.

    PYTHONPATH=tests python -m architectures.run [--only NAME …] [--json FILE] [--resume] [--page PAGE]

Two processes work in parallel; one that takes longer than --timeout for an architecture is killed and replaced.
"""

import argparse
import dataclasses
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MARK = "@@report "
LIFETIME = 20  # architectures per process: what they leave behind in Dynamo and in memory stays bounded


def main() -> None:
    arguments = parse()
    if arguments.worker:
        return work()
    done: dict[str, Any] = {}
    start = time.perf_counter()
    if arguments.resume and arguments.json.exists():
        saved = json.loads(arguments.json.read_text())
        done = {entry["name"]: entry for entry in saved["reports"]}
        start -= saved["seconds"]
    names = arguments.only or all_names()
    for report in measured([name for name in names if name not in done], arguments.timeout):
        done[report["name"]] = report
        print(line(report), flush=True)
        if arguments.json:
            save(arguments.json, done, time.perf_counter() - start)
    if arguments.page:
        from architectures.page import page

        arguments.page.write_text(page(list(done.values()), time.perf_counter() - start), encoding="utf-8")
    return None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names as AutoModelForCausalLM knows them, or family:name")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one architecture")
    parser.add_argument("--json", type=Path, help="write every report to this file as it comes")
    parser.add_argument("--resume", action="store_true", help="skip what the --json file holds already")
    parser.add_argument("--page", type=Path, help="write the table to this page, usually docs/architectures.md")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def all_names() -> list[str]:
    from architectures import tiny

    return [*tiny.causal_names(), *tiny.family_names()]


def save(path: Path, done: dict[str, Any], seconds: float) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps({"seconds": seconds, "reports": list(done.values())}, indent=1))
    partial.replace(path)


def line(report: dict[str, Any]) -> str:
    if report["cause"]:
        return f"{report['name']}: {report['cause']}"
    change = max(report["calibrated"], report["adversarial"], report["in_place"])
    return f"{report['name']}: {report['graphs']} graphs, change {change:.0e}, {report['seconds']:.0f} s"


def measured(names: list[str], timeout: float) -> Iterator[dict[str, Any]]:
    """Reports as they come, from two processes."""
    waiting: queue.Queue[str] = queue.Queue()
    reports: queue.Queue[dict[str, Any]] = queue.Queue()
    for name in names:
        waiting.put(name)
    for _ in range(min(2, len(names))):
        threading.Thread(target=serve, args=(waiting, reports, timeout), daemon=True).start()
    for _ in names:
        yield reports.get()


def serve(waiting: "queue.Queue[str]", reports: "queue.Queue[dict[str, Any]]", timeout: float) -> None:
    process, served = None, 0
    while True:
        try:
            name = waiting.get_nowait()
        except queue.Empty:
            break
        if process is None or served == LIFETIME:
            stop(process)
            process, served = worker(), 0
        report = ask(process, name, timeout)
        served += 1
        if report is None:
            died = process.poll() is not None
            cause = f"the process died (status {process.returncode})" if died else f"took longer than {timeout:.0f} s"
            report = {"name": name, "cause": cause, "model": "", "seconds": timeout}
            stop(process)
            process = None
        reports.put(report)
    stop(process)


def worker() -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-P", "-W", "ignore", "-m", "architectures.run", "--worker"]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def stop(process: "subprocess.Popen[str] | None") -> None:
    if process is not None:
        process.kill()
        process.communicate()


def ask(process: "subprocess.Popen[str]", name: str, timeout: float) -> dict[str, Any] | None:
    """A worker's report, or None if it died or took too long."""
    assert process.stdin is not None
    assert process.stdout is not None
    deadline = time.monotonic() + timeout
    try:
        process.stdin.write(name + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([process.stdout], [], [], left)[0]:
            return None
        text = process.stdout.readline()
        if not text:
            process.wait()
            return None
        if text.startswith(MARK):
            report: dict[str, Any] = json.loads(text.removeprefix(MARK))
            return report
    return None


def work() -> None:
    """Answer names on stdin with reports on stdout."""
    import logging

    import torch

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    from architectures.measure import measure

    for name in sys.stdin:
        report = measure(name.strip())
        print(MARK + json.dumps(dataclasses.asdict(report)), flush=True)


if __name__ == "__main__":
    main()
