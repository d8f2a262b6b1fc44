"""The graphs of five tiny architectures as text, before and after the passes: tests/golden/graphs/.

    python -P tests/golden_graphs.py [FOLDER [NAME …]]      writes them again (make goldens)

A change of the passes or of a dump's form changes them: look at the difference, then commit it. Node names and
decompositions are torch's and transformers', so the files are for the versions named in their first line.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from qcompile.capture import capture_call
from qcompile.config import Config
from qcompile.dump import graph_text
from qcompile.passes import quantizing

FOLDER = Path(__file__).parent / "golden" / "graphs"
VERSIONS = f"# torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}\n"
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}


def llama() -> Any:
    return transformers.LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)


def gpt2() -> Any:
    return transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=32)


def mixtral() -> Any:
    return transformers.MixtralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, num_local_experts=4)


def opt() -> Any:
    return transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32)


def gemma2() -> Any:
    return transformers.Gemma2Config(**SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8)


CONFIGS: dict[str, Callable[[], Any]] = {kind.__name__: kind for kind in (llama, gpt2, mixtral, opt, gemma2)}


def text(name: str) -> str:
    """Both graphs of one architecture. Values do not matter, so weights are on the meta device."""
    torch._dynamo.reset()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().requires_grad_(False)
        ids = torch.ones(2, 8, dtype=torch.int64)
    (captured,) = capture_call(model, {"input_ids": ids, "use_cache": False})
    quantized, _ = quantizing(Config(calibrate=1)).run(captured.graph)
    return f"{VERSIONS}# captured\n{graph_text(captured.graph)}# quantized\n{graph_text(quantized)}"


def write(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or CONFIGS:
        (folder / f"{name}.txt").write_text(text(name), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER, *sys.argv[2:])
