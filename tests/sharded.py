"""Quantized models and their logits, whole or shared out: run in one process and in several."""

import functools
from pathlib import Path
from typing import Any

import torch
from checkpoints import IDS
from torch import Tensor

import qcompile
from qcompile.parallel.ranks import joined
from qcompile.parallel.tensor_parallel import shard

# Lengths of prompts: one token, and more.
SHAPES = ((1, 1), (2, 9))
# Name → dtype, activations, dtype of the float model.
MODELS = {
    "int8 token": ("int8", "token", torch.float32),
    "int8 static": ("int8", "static", torch.float32),
    "int8 token, bfloat16": ("int8", "token", torch.bfloat16),
    "fp8 token": ("fp8", "token", torch.float32),
}


@functools.cache
def model(name: str) -> Any:
    """A Llama with biases everywhere, one of them row parallel; eight heads and four KV heads; not to be changed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype, activations, load = MODELS[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=64, max_position_embeddings=64, initializer_range=0.3, attention_bias=True, mlp_bias=True,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    made = LlamaForCausalLM._from_config(config, dtype=load).eval()
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if key.endswith("bias"):
                parameter.uniform_(-1, 1)
    return qcompile.quantize(made, [IDS, IDS.flip(1)], dtype=dtype, activations=activations)  # type: ignore[arg-type]


def logits(part: Any, inner: str | None) -> list[Tensor]:
    """Of a few prompts. inner: how to compile; None for eager PyTorch."""
    torch._dynamo.reset()
    if inner is not None:
        part = torch.compile(part, backend="w8a8", options={"inner": inner}, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return [
            part(input_ids=torch.randint(1, 64, shape, generator=generator), use_cache=False).logits
            for shape in (SHAPES[-1:] if inner == "inductor" else SHAPES)
        ]


def sharded_logits(folder: str, inners: dict[str, list[str | None]]) -> dict[tuple[str, str | None], list[Tensor]]:
    """Runs in every process: logits of the saved models, compiled in these ways."""
    found = {}
    with joined() as ranks:
        for name, ways in inners.items():
            part = qcompile.from_pretrained(Path(folder) / name)
            shard(part, ranks.rank, ranks.size, ranks.group)
            for inner in ways:
                found[name, inner] = [one.clone() for one in logits(part, inner)]
    return found


def failing(rank: int, where: str) -> str:
    """Runs in every process: one fails, or all, or one ends without a word, while the others wait for it."""
    import os

    import torch.distributed as dist

    from qcompile.errors import ConfigError

    with joined() as ranks:
        dist.all_reduce(torch.zeros(1))
        if where == "everywhere" or ranks.rank == rank:
            if where == "killed":
                os._exit(1)
            raise ConfigError(f"process {ranks.rank} must be told why")
        dist.all_reduce(torch.zeros(1))
    return "done"
