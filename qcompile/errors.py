"""Every error qcompile raises. Each message is one line: what must hold, what was received, what to do."""


class QCompileError(Exception):
    """Base of all errors raised on purpose; anything else that escapes is a bug."""


class ConfigError(QCompileError, ValueError):
    """An option or argument is unknown, malformed or contradicts another."""


class CalibrationError(QCompileError, ValueError):
    """Calibration data or a calibration file is empty, not finite, or belongs to another model."""


class CaptureError(QCompileError):
    """The model cannot be captured as a functional ATen graph for inference."""


class GradientError(QCompileError, RuntimeError):
    """A compiled model was called where gradients are required; w8a8 is inference only."""


class WeightError(QCompileError, ValueError):
    """A weight is NaN or infinite, or became so when smoothing was folded into it."""


class PassError(QCompileError):
    """A pass failed or produced an illegal graph."""


class VerifyError(PassError):
    """The verifier or translation validation found a graph that must not be used."""


class LoweringError(QCompileError):
    """The target cannot run what was asked for."""


class CheckpointError(QCompileError, ValueError):
    """A model folder is not what it should be, or cannot be written."""


class GraphError(QCompileError, ValueError):
    """A saved graph is broken, unsafe to read, or holds what cannot be saved."""


class RankError(QCompileError, RuntimeError):
    """The processes of a tensor parallel run cannot find, or have lost, each other."""


class OtherRankError(RankError):
    """Another process of a tensor parallel run failed, and says why; this one has nothing to add."""
