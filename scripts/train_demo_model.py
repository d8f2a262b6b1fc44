"""Train the small language model that ships in qcompile/demo_model.

A Llama-shaped model of under two million parameters and its byte-level tokenizer learn the
`train` split of the Python standard library, on one CPU core in about an hour:

    python scripts/train_demo_model.py --out qcompile/demo_model

The run is seeded, but machines, torch releases and thread counts round differently and the text
itself changes between Python releases, so expect an equally good model rather than the same bytes.
"""

import argparse
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from qcompile.stdlib_text import stdlib_files, stdlib_text

CONTEXT = 256
VOCABULARY = 1024
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
MAX_FOLDER_BYTES = 4_000_000
SAMPLE_PROMPT = "def read_file(path"


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text."""

    nats_per_token: float
    bytes_per_token: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        return self.nats_per_token / math.log(2) / self.bytes_per_token


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the demo model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=20_000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=4, help=f"windows of {CONTEXT} tokens in a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="decay of the matrices")
    parser.add_argument("--seed", type=int, default=0, help="seeds the initial weights and the sampling")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--save-every", type=int, default=2000, help="steps between checkpoints in --out")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the training step"
    )
    return parser.parse_args()


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary, which encodes and restores any string exactly."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=432,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.07,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # trains faster than the fused kernel on a CPU at this size
    )
    model = LlamaForCausalLM(config)
    scale_residual_branches(model)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


@torch.no_grad()
def scale_residual_branches(model: LlamaForCausalLM) -> None:
    """Shrink what each branch adds at first, so that the sum over all layers starts near the embedding."""
    layers = model.model.layers
    for layer in layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.mul_((2 * len(layers)) ** -0.5)


def encode_files(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Return the tokens of all files as one stream, each file closed by the end-of-text token."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    end = tokenizer.eos_token_id
    return torch.tensor([token for encoding in encodings for token in [*encoding.ids, end]])


def training_batches(stream: Tensor, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of windows for ever; each epoch cuts the stream at other places."""
    span = torch.arange(CONTEXT + 1)
    while True:
        offset = int(torch.randint(CONTEXT, (), generator=generator))
        starts = torch.arange(offset, len(stream) - CONTEXT, CONTEXT)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for chunk in starts[: len(starts) // batch * batch].view(-1, batch):
            yield stream[chunk[:, None] + span]


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def warmup_then_cosine(steps: int) -> Callable[[int], float]:
    warmup = max(1, min(200, steps // 10))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2

    return factor


def next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    stream: Tensor,
    arguments: argparse.Namespace,
) -> None:
    generator = torch.Generator().manual_seed(arguments.seed)
    batches = training_batches(stream, arguments.batch, generator)
    optimizer = build_optimizer(model, arguments.lr, arguments.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_cosine(arguments.steps))
    loss_of = torch.compile(next_token_loss) if arguments.compile else next_token_loss
    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=arguments.steps, loss=math.log(VOCABULARY))
        smoothed = math.log(VOCABULARY)
        for step in range(1, arguments.steps + 1):
            loss = loss_of(model, next(batches))
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            smoothed += (loss.item() - smoothed) / min(step, 100)
            progress.update(bar, completed=step, loss=smoothed)
            if step % arguments.save_every == 0:
                save(model, tokenizer, arguments.out)
                progress.console.print(f"step {step}: training loss {smoothed:.3f}")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the weights as bfloat16, leaving the model in training as it is."""
    config = model.config.to_dict() | {"dtype": "bfloat16"}
    exported = LlamaForCausalLM(LlamaConfig.from_dict(config)).to(torch.bfloat16)
    exported.load_state_dict(model.state_dict())
    exported.generation_config = model.generation_config
    exported.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def score(model: nn.Module, tokens: Tensor, byte_count: int, batch: int = 16) -> Score:
    """Score every token but the first of each whole window of `CONTEXT` tokens."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    total = 0.0
    for chunk in torch.split(windows, batch):
        logits = model(input_ids=chunk[:, :-1], use_cache=False).logits
        targets = chunk[:, 1:].flatten()
        total += F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum").item()
    return Score(total / (len(windows) * (CONTEXT - 1)), byte_count / len(tokens))


def score_saved(folder: Path, text: str, dtype: torch.dtype) -> Score:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokens = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)
    return score(model, tokens, len(text.encode()))


def sample(folder: Path, prompt: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=True,
        temperature=0.6,
        top_k=0,
        max_new_tokens=160,
    )
    return str(tokenizer.decode(tokens[0]))


def readme(arguments: argparse.Namespace, tokens: int, parameters: int, minutes: float) -> str:
    """Describe the model in `arguments.out`, with figures measured from the saved files."""
    text = stdlib_text("held_out")
    full = score_saved(arguments.out, text, torch.float32)
    half = score_saved(arguments.out, text, torch.bfloat16)
    command = shlex.join(["python", "scripts/train_demo_model.py", *sys.argv[1:]])
    seen = arguments.steps * arguments.batch * CONTEXT
    return f"""# Demo model

A Llama-shaped language model of {parameters:,} parameters (bfloat16) and its byte-level BPE tokenizer
({VOCABULARY} tokens), which write something like Python. They exist to show and test quantization.

- Trained on the Python standard library, whose licence is the PSF License Agreement; files whose path
  hashes to the `held_out` or `calibration` split (`qcompile/stdlib_text.py`) took no part.
- Command: `{command}`
- Made with Python {platform.python_version()}, torch {torch.__version__}, transformers \
{transformers.__version__}, tokenizers {tokenizers.__version__}. Another machine or release
  gives a slightly different model, not these bytes.
- {arguments.steps:,} steps over {seen / 1e6:.1f} million tokens ({seen / tokens:.1f} epochs) \
in {minutes:.0f} minutes on {arguments.threads} CPU thread(s).
- Held-out text, windows of {CONTEXT} tokens: float32 {full.bits_per_byte:.4f} bits per byte, \
perplexity {full.perplexity:.3f} per token;
  bfloat16 {half.bits_per_byte:.4f} bits per byte, perplexity {half.perplexity:.3f} \
({full.bytes_per_token:.2f} bytes per token).
"""


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    texts = list(stdlib_files("train").values())
    tokenizer = train_tokenizer(texts)
    stream = encode_files(tokenizer, texts)
    model = build_model(tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters; {len(stream):,} training tokens in {len(texts)} files")

    started = time.monotonic()
    train(model, tokenizer, stream, arguments)
    save(model, tokenizer, arguments.out)
    minutes = (time.monotonic() - started) / 60

    text = readme(arguments, len(stream), parameters, minutes)
    (arguments.out / "README.md").write_text(text, encoding="utf-8")
    size = sum(file.stat().st_size for file in arguments.out.iterdir())
    print(text, sample(arguments.out, SAMPLE_PROMPT), f"{size:,} bytes in {arguments.out}", sep="\n")
    if size > MAX_FOLDER_BYTES:
        raise SystemExit(f"{arguments.out} holds {size:,} bytes: the limit is {MAX_FOLDER_BYTES:,}")


if __name__ == "__main__":
    main()
