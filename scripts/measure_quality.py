"""Change in mean NLL under W8A8, against the float model, with and without smoothing and injected outliers.

    python scripts/measure_quality.py MODEL --text FILE --calibration FILE [--json OUT]

Protocol: the first 200,000 characters of the text, non-overlapping windows of 256 tokens, lm_head in float.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qcompile
from qcompile.outliers import inject_outliers
from qcompile.quality.likelihood import score, token_windows

CHARACTERS, WINDOW, BATCH = 200_000, 256, 16
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("token, no smoothing", {}),
    ("token, alpha=0.5", {"alpha": 0.5}),
    ("token, alpha=0.5, p absorb", {"alpha": 0.5, "power_of_two": "absorb"}),
    ("token, alpha=0.5, p drop", {"alpha": 0.5, "power_of_two": "drop"}),
    ("token, alpha=auto", {"alpha": "auto"}),
    ("tensor, no smoothing", {"activations": "tensor"}),
    ("tensor, alpha=0.5", {"activations": "tensor", "alpha": 0.5}),
    ("tensor, alpha=auto", {"activations": "tensor", "alpha": "auto"}),
    ("static, no smoothing", {"activations": "static", "alpha": None}),
    ("static, alpha=0.5", {"activations": "static", "alpha": 0.5}),
    ("static, alpha=auto", {"activations": "static", "alpha": "auto"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--calibration", required=True, help="calibration text")
    parser.add_argument("--dtype", default="int8", choices=("int8", "fp8", "fp8_e5m2"))
    parser.add_argument("--load", default="float32", choices=("float32", "bfloat16"), help="the float model's dtype")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--json", help="also write the rows to this file")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = Path(arguments.text).read_text(encoding="utf-8")[:CHARACTERS]
    windows = token_windows(tokenizer, text, WINDOW)
    data = token_windows(tokenizer, Path(arguments.calibration).read_text(encoding="utf-8"), WINDOW, limit=128)
    rows = []
    for injected in (False, True):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.load)).eval()
        if injected:
            inject_outliers(model)
        rows += measure(model, windows, data, injected, arguments)
    if arguments.json:
        versions = {"torch": torch.__version__, "python": platform.python_version(), "cpu": platform.processor()}
        Path(arguments.json).write_text(json.dumps({"versions": versions, "rows": rows}, indent=2))


def measure(
    model: Any, windows: torch.Tensor, data: torch.Tensor, injected: bool, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    base = score(model, windows, BATCH)
    print(
        f"{Path(arguments.model).name}, outliers injected: {injected}; float NLL {base.nll:.4f}, {base.tokens} tokens"
    )
    calibration = qcompile.calibrate(model, data.split(BATCH))
    rows = []
    for name, options in VARIANTS:
        torch._dynamo.reset()
        needs = {"calibration": calibration} if "alpha" in options else {}
        settings = {"dtype": arguments.dtype, "inner": arguments.inner, **needs, **options}
        compiled = torch.compile(model, backend="w8a8", options=settings, dynamic=False)
        change = score(compiled, windows, BATCH).nll - base.nll
        print(f"  {name:27s} {change:+.5f}", flush=True)
        rows.append({"model": Path(arguments.model).name, "injected": injected, "variant": name, "change": change})
    return rows


if __name__ == "__main__":
    main()
