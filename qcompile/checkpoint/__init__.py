"""Quantized model folders: their formats, writing them, and loading them through transformers."""
