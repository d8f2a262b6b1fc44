"""W8A8 for Hugging Face style models: `torch.compile(model, backend="w8a8")`, and what stands around it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompile.bisection import bisect as bisect
    from qcompile.calibration import Calibration as Calibration
    from qcompile.config import Config as Config
    from qcompile.errors import QCompileError as QCompileError
    from qcompile.explanation import Explanation as Explanation
    from qcompile.explanation import explain as explain
    from qcompile.loading import from_pretrained as from_pretrained
    from qcompile.quantizing import quantize as quantize
    from qcompile.recording import calibrate as calibrate
    from qcompile.reporting import Report as Report
    from qcompile.reporting import report as report
    from qcompile.saving import save_pretrained as save_pretrained
    from qcompile.smoothing import smooth as smooth
    from qcompile.text_pipeline import pipeline as pipeline
    from qcompile.weights import refresh as refresh

__version__ = "0.1.0"

_HOMES = {
    "bisect": "qcompile.bisection",
    "calibrate": "qcompile.recording",
    "Calibration": "qcompile.calibration",
    "Config": "qcompile.config",
    "Explanation": "qcompile.explanation",
    "QCompileError": "qcompile.errors",
    "explain": "qcompile.explanation",
    "from_pretrained": "qcompile.loading",
    "pipeline": "qcompile.text_pipeline",
    "quantize": "qcompile.quantizing",
    "report": "qcompile.reporting",
    "Report": "qcompile.reporting",
    "save_pretrained": "qcompile.saving",
    "smooth": "qcompile.smoothing",
    "refresh": "qcompile.weights",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qcompile' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
