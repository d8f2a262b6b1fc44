"""W8A8 for Hugging Face style models: `torch.compile(model, backend="w8a8")`, and what stands around it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompile.bisection.bisect import bisect as bisect
    from qcompile.calibration import Calibration as Calibration
    from qcompile.checkpoint.loading import from_pretrained as from_pretrained
    from qcompile.checkpoint.saving import save_pretrained as save_pretrained
    from qcompile.config import Config as Config
    from qcompile.errors import QCompileError as QCompileError
    from qcompile.explanation import Explanation as Explanation
    from qcompile.explanation import explain as explain
    from qcompile.generation.pipeline import pipeline as pipeline
    from qcompile.quantizing import quantize as quantize
    from qcompile.recording import calibrate as calibrate
    from qcompile.reporting.report import Report as Report
    from qcompile.reporting.report import report as report
    from qcompile.smoothing import smooth as smooth
    from qcompile.weights import refresh as refresh

__version__ = "0.1.0"

_HOMES = {
    "bisect": "qcompile.bisection.bisect",
    "calibrate": "qcompile.recording",
    "Calibration": "qcompile.calibration",
    "Config": "qcompile.config",
    "Explanation": "qcompile.explanation",
    "QCompileError": "qcompile.errors",
    "explain": "qcompile.explanation",
    "from_pretrained": "qcompile.checkpoint.loading",
    "pipeline": "qcompile.generation.pipeline",
    "quantize": "qcompile.quantizing",
    "report": "qcompile.reporting.report",
    "Report": "qcompile.reporting.report",
    "save_pretrained": "qcompile.checkpoint.saving",
    "smooth": "qcompile.smoothing",
    "refresh": "qcompile.weights",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qcompile' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
