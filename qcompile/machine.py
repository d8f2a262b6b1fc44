"""What a machine can run, per device and dtype, and what is missing on it."""

import importlib.util
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
