"""Lowering: from quantized graphs to what a machine runs. A function of the graph and a Target value."""

from qcompile.lowering.target import Target, detect

__all__ = ["Target", "detect"]
