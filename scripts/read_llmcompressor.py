"""Folders that llm-compressor writes, read here and by stock transformers: do both compute the same?

    python scripts/read_llmcompressor.py write MODEL OUT      # where llm-compressor is installed
    python scripts/read_llmcompressor.py compare OUT          # where qcompile is installed

Calibrated on random tokens: only whether readers agree matters here. "difference" is the largest one of logits, in the
reference mode with the compressed-tensors grid; "own grid" is with the grid that kernels use.
"""

import argparse
import contextlib
import io
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

SCHEMES = ("W8A8", "INT8", "FP8_DYNAMIC", "FP8")
ROWS, TOKENS = 8, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True)
    writing = commands.add_parser("write")
    writing.add_argument("model", type=Path)
    writing.add_argument("out", type=Path)
    writing.set_defaults(run=lambda arguments: write(arguments.model, arguments.out))
    comparing = commands.add_parser("compare")
    comparing.add_argument("out", type=Path)
    comparing.set_defaults(run=lambda arguments: compare(arguments.out))
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    arguments.run(arguments)


def write(source: Path, out: Path) -> None:
    """One folder per scheme."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    for scheme in SCHEMES:
        model = AutoModelForCausalLM.from_pretrained(source)
        ids = torch.randint(0, model.config.vocab_size, (ROWS, TOKENS))
        rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
        recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
        oneshot(
            model=model, dataset=Dataset.from_dict(rows), recipe=recipe, max_seq_length=TOKENS,
            num_calibration_samples=ROWS,
        )  # fmt: skip
        model.save_pretrained(out / scheme, save_compressed=True)


@torch.no_grad()
def compare(out: Path) -> None:
    """Logits of every folder, by stock transformers and by us."""
    import qcompile
    from qcompile.checkpoint.fake_quantized import fake_quantized
    from qcompile.quantized_linear import quantized_linears

    for scheme in SCHEMES:
        with contextlib.redirect_stderr(io.StringIO()):
            stock = AutoModelForCausalLM.from_pretrained(out / scheme).eval()
            ids = torch.randint(0, stock.config.vocab_size, (2, 40))
            expected = stock(ids).logits
        model = qcompile.from_pretrained(out / scheme)
        linears = quantized_linears(model)
        integers = [linear.weight for linear in linears.values() if linear.weight.dtype == torch.int8]
        lowest = sum(int((weight == -128).sum()) for weight in integers)
        with fake_quantized(model):
            difference = float((model(ids).logits - expected).abs().max())
        own = float((model(ids).logits - expected).abs().max())
        print(
            f"{scheme}: {len(linears)} linears, {lowest} int8 weights of -128, difference {difference}, "
            f"own grid {own:.2g}, logits up to {float(expected.abs().max()):.1f}"
        )


if __name__ == "__main__":
    main()
