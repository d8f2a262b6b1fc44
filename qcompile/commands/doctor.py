"""`qcompile doctor`: what this machine can run, and what is missing."""

import argparse
import importlib.util
import json
import platform
import sys
import warnings
from typing import Any

import torch

from qcompile.errors import LoweringError
from qcompile.lowering.select import check_dtype, select_scaled_mm
from qcompile.lowering.target import Target, detect
from qcompile.ops import TORCH_DTYPES
from qcompile.versions import installed

VERSIONS = ("qcompile", "torch", "transformers", "triton", "safetensors", "datasets")
# What is not needed, and what is missed without it.
OPTIONAL = {
    "compressed_tensors": "stock transformers cannot read what qcompile writes; qcompile can",
    "lm_eval": "lm-evaluation-harness is not installed",
}


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser."""
    parser = commands.add_parser("doctor", help="what this machine can run: int8 and fp8 per device; what is missing")
    parser.add_argument("--target", metavar="SM", help="also what a GPU that is not here can run, such as sm90")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the report."""
    found = report()
    if arguments.target is not None:
        found["devices"].append(describe(Target.parse(arguments.target), arguments.target, "not in this machine"))
    print(json.dumps(found, indent=2) if arguments.json else _text(found))


def report() -> dict[str, Any]:
    """Versions, devices with what they can run, and what is missing."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: installed(name) for name in VERSIONS},
        "devices": [describe(detect(device), str(device), _name(device)) for device in devices],
        "missing": _missing(),
    }


def describe(target: Target, device: str, name: str) -> dict[str, Any]:
    """One device: per dtype the kernel that runs, or why none does."""
    return {
        "device": device,
        "name": name,
        "target": str(target),
        "capability": target.capability / 10 if target.capability else None,
        "dtypes": {dtype: _support(target, dtype) for dtype in TORCH_DTYPES},
    }


def _support(target: Target, dtype: str) -> dict[str, Any]:
    example = torch.empty(16, 64, dtype=TORCH_DTYPES[dtype], device="meta")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_dtype(target, TORCH_DTYPES[dtype])
        kernel, passed_over = select_scaled_mm(target, example, example)
    except LoweringError as error:
        return {"runs": False, "kernel": None, "note": str(error)}
    notes = [str(warning.message) for warning in caught]
    notes += passed_over
    return {"runs": True, "kernel": kernel.name, "note": "; ".join(notes)}


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _missing() -> list[str]:
    from qcompile.lowering.inductor import has_compiler

    found = [] if has_compiler() else ['a C++ compiler: compiled graphs run op by op (inner="eager")']
    if sys.platform == "linux" and torch.cuda.is_available() and installed("triton") is None:
        found.append("triton: no kernels for the GPU")
    found += [f"{name}: {loss}" for name, loss in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    return found


def _text(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in found["versions"].items())
    lines = [f"Python {found['python']} on {found['platform']}", versions]
    for device in found["devices"]:
        lines.append(f"{device['device']}: {device['name']}, {device['target']}")
        for dtype, support in device["dtypes"].items():
            state = f"yes, kernel {support['kernel']}" if support["runs"] else "no"
            lines.append(f"  {dtype}: {state}" + (f" ({support['note']})" if support["note"] else ""))
    return "\n".join([*lines, *(f"missing: {what}" for what in found["missing"])])
