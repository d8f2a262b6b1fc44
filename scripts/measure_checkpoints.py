"""Checkpoints on real models: quality, size, bits after loading, stock transformers, and memory on 1.1B parameters.

    python scripts/measure_checkpoints.py DATA [--memory-only | --no-memory] [--json OUT]

DATA is the folder with models/ and text/. Everything goes through the command line, the folder and from_pretrained.
Protocol: the first 200,000 characters of the TinyStories validation text, non-overlapping windows of 256 tokens,
lm_head in float, calibrated on 128 windows of TinyStories-like training text.
"""

import argparse
import contextlib
import io
import itertools
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import qcompile
from qcompile import cli, ops
from qcompile.checkpoint.fake_quantized import fake_quantized
from qcompile.outliers import inject_outliers
from qcompile.quality.likelihood import score, token_windows
from qcompile.quantized_linear import quantized_linears

MODELS = ("stories260K", "babyllama361")
CHARACTERS, WINDOW, BATCH, SAMPLES = 200_000, 256, 16, 128
VARIANTS = tuple(itertools.product(("int8", "fp8"), ("token", "static"), ("0.5", "auto")))
# A Llama of TinyLlama's shape.
LARGE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="folder with models/ and text/")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--memory-only", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--memory-run", nargs=2, metavar=("ALPHA", "SHAPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    if arguments.memory_run:
        measure_memory(*arguments.memory_run)
        return
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "rows": [], "memory": []}
    with tempfile.TemporaryDirectory() as place:
        if not arguments.memory_only:
            for model in MODELS:
                found["rows"] += measure_model(arguments, model, Path(place))
    if not arguments.no_memory:
        # The small one shows what libraries and graphs take by themselves.
        found["memory"] = [run_memory(arguments.data, *case) for case in (("0.5", "small"), ("0.5", "large"))]
        found["memory"].append(run_memory(arguments.data, "auto", "large"))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2))


def measure_model(arguments: argparse.Namespace, name: str, place: Path) -> Iterator[dict[str, Any]]:
    source = arguments.data / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = (arguments.data / "text" / "tinystories_valid.txt").read_text(encoding="utf-8")[:CHARACTERS]
    windows = token_windows(tokenizer, text, WINDOW)
    base = score(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(), windows, BATCH)
    print(f"{name}: float32 NLL {base.nll:.4f}, {base.tokens} tokens", flush=True)
    injected = place / f"{name}-injected"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    inject_outliers(model)
    model.save_pretrained(injected)
    tokenizer.save_pretrained(injected)
    for dtype, activations, alpha in VARIANTS:
        yield measure(arguments, source, place, windows, base.nll, dtype, activations, alpha)
    for alpha in ("none", "0.5", "auto"):
        row = measure(arguments, injected, place, windows, base.nll, "int8", "token", alpha)
        yield {**row, "injected": True}
    yield from measure_halves(source, windows, base.nll)


def measure_halves(source: Path, windows: torch.Tensor, base: float) -> Iterator[dict[str, Any]]:
    """What weights alone and activations alone cost: rounded per channel and per token, unsmoothed, float products."""

    def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        q, scale = ops.quantize(x, [], "row", dtype)
        return q.to(torch.float32) * scale[..., None]

    for dtype, half in itertools.product(("int8", "fp8"), ("weights", "activations")):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        kind = ops.TORCH_DTYPES[dtype]
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                if half == "weights":
                    module.weight.data = rounded(module.weight.data, kind)
                else:
                    module.register_forward_pre_hook(lambda _, inputs, kind=kind: (rounded(inputs[0], kind),))
        row = {"model": source.name, "dtype": dtype, "only": half, "change": score(model, windows, BATCH).nll - base}
        print("  " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        yield row


def measure(
    arguments: argparse.Namespace, source: Path, place: Path, windows: torch.Tensor, base: float, dtype: str,
    activations: str, alpha: str,
) -> dict[str, Any]:  # fmt: skip
    """One folder: written, loaded, scored, and compared with what stock transformers makes of it."""
    out = place / f"{source.name}-{dtype}-{activations}-{alpha}"
    calibration = arguments.data / "text" / "tinystories_train_sample.txt"
    options = ["--dtype", dtype, "--activations", activations, "--alpha", alpha, "--calibration", str(calibration)]
    options += ["--seqlen", str(WINDOW), "--samples", str(SAMPLES), "--batch-size", str(BATCH), "--quality", "0"]
    torch._dynamo.reset()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        if cli.main(["quantize", str(source), "--out", str(out), *options, "--json"]):
            raise SystemExit(errors.getvalue())
    model = qcompile.from_pretrained(out)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="w8a8", options={"inner": arguments.inner}, dynamic=False)
    row = {
        "model": source.name, "dtype": dtype, "activations": activations, "alpha": alpha,
        "change": score(fast, windows, BATCH).nll - base, **sizes(out, model), "stock": against_stock(out, windows[:2]),
    }  # fmt: skip
    print("  " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def sizes(out: Path, model: Any) -> dict[str, float]:
    """Bytes of the linears' weights, and of weights and scales, as shares of the same weights in bfloat16."""
    tensors = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    linears = quantized_linears(model)
    weights = sum(tensors[f"{name}.weight"].nbytes for name in linears)
    scales = sum(tensors[f"{name}.weight_scale"].nbytes for name in linears)
    half = sum(2 * tensors[f"{name}.weight"].numel() for name in linears)
    return {"weights": weights / half, "with scales": round((weights + scales) / half, 4)}


def against_stock(out: Path, ids: torch.Tensor) -> float:
    """Largest difference of logits between stock transformers and our reference mode with its grid."""
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(out).eval()(ids).logits
    with fake_quantized(qcompile.from_pretrained(out)) as model, torch.no_grad():
        return float((model(ids).logits - stock).abs().max())


def run_memory(data: Path, alpha: str, shape: str) -> dict[str, Any]:
    """A process of its own: peaks do not go away."""
    command = [sys.executable, "-P", __file__, str(data), "--memory-run", alpha, shape]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"memory, {shape}, alpha {alpha}: {row}", flush=True)
    return row


def measure_memory(alpha: str, shape: str) -> None:
    """Quantize and save a random Llama in bfloat16, watching the resident size. Prints JSON; sizes in MiB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    scale = 1 if shape == "large" else 16
    values = {key: value if "num" in key or "max" in key else value // scale for key, value in LARGE.items()}
    values |= {} if shape == "large" else {"num_attention_heads": 8}
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**values), dtype=torch.bfloat16).eval()
    size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    ids = torch.randint(0, values["vocab_size"], (4, 512))
    watch = Watch()
    started = time.perf_counter()
    batches = [{"input_ids": row, "use_cache": False, "logits_to_keep": 1} for row in torch.split(ids, 1)]
    loaded = watch.now()
    alpha_value: Any = alpha if alpha == "auto" else float(alpha)
    qcompile.quantize(model, batches, alpha=alpha_value)
    quantized = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        qcompile.save_pretrained(model, Path(place) / "out", shard_size=2**30)
    row = {
        "parameters": sum(weight.numel() for weight in model.state_dict().values()), "model": size, "loaded": loaded,
        "peak": watch.peak(), "above": watch.peak() - loaded, "share": (watch.peak() - loaded) / size,
        "after": watch.now(), "quantize seconds": quantized - started, "save seconds": time.perf_counter() - quantized,
    }  # fmt: skip
    print(json.dumps({key: round(value, 3) for key, value in row.items()}))


class Watch:
    """The largest resident size of this process, looked at fifty times a second."""

    def __init__(self) -> None:
        self._peak = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> float:
        """Resident MiB."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096 / 2**20

    def peak(self) -> float:
        """The largest so far, in MiB."""
        return max(self._peak, self.now())

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, self.now())
            time.sleep(0.02)


if __name__ == "__main__":
    main()
