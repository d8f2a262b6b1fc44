"""The README.md of a quantized folder: what was done, on what data, and how good it is."""

from collections.abc import Mapping
from typing import Any

from qcompile.record import Record, by_reason

NUMBERS = {"int8": "INT8", "fp8": "FP8 (e4m3)", "fp8_e5m2": "FP8 (e5m2)"}


def model_card(record: Record | None, quantization_config: Mapping[str, Any], linears: int, *, title: str) -> str:
    """Markdown with the front matter that model hubs read."""
    method = quantization_config["quant_method"]
    tags = "\n".join(f"- {tag}" for tag in ("w8a8", "smoothquant", method))
    is_hub_name = record is not None and record.model.count("/") == 1
    base = f"base_model: {record.model}\n" if record is not None and is_hub_name else ""
    lines = [f"---\nlibrary_name: transformers\n{base}tags:\n{tags}\n---\n", f"# {title}\n"]
    lines.append(f"W8A8: {linears} linears with 8-bit weights and 8-bit activations, in the format `{method}`.\n")
    if record is not None:
        lines += [*_table(record), *_left_out(record)]
    lines.append(
        'Load it with `qcompile.from_pretrained`, and run it with `torch.compile(model, backend="w8a8")`.'
        + (
            " vLLM, SGLang and transformers read it as well."
            if method == "compressed-tensors"
            else " LMDeploy reads it."
        )
    )
    return "\n".join(lines) + "\n"


def _table(record: Record) -> list[str]:
    smoothing = "none" if record.alpha is None else f"SmoothQuant, α = {record.alpha}"
    activations = "per token, dynamic" if record.activations == "token" else f"per tensor, static (clip: {record.clip})"
    source = f" of {record.source}" if record.source else ""
    rows = {
        "numbers": NUMBERS[record.dtype],
        "weights": "per output channel, symmetric",
        "activations": activations,
        "smoothing": smoothing,
        "calibration": f"{record.tokens} tokens in {record.batches} batches{source}",
        **{name: f"{value:.4f}" for name, value in record.quality.items()},
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]


def _left_out(record: Record) -> list[str]:
    lines = []
    for title, group in (("In float", record.kept), ("Quantized without smoothing", record.unsmoothed)):
        if group:
            parts = [f"{names} ({reason})" for names, reason in by_reason(group, quote="`")]
            lines.append(f"{title}: {'; '.join(parts)}.\n")
    return lines
