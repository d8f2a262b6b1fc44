"""Tiny models, tokenizers and folders for checkpoint tests. Quantizing takes seconds, so results are kept and
copied."""

import copy
import functools
import json
import string
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qcompile

IDS = torch.randint(1, 60, (2, 16), generator=torch.Generator().manual_seed(0))
TEXT = "the quick brown fox jumps over the lazy dog and then it sleeps until the morning comes again "


def llama(dtype: torch.dtype = torch.float32, *, layers: int = 1, tied: bool = True) -> Any:
    """A Llama of two KV heads to four heads, with outliers for smoothing to work on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=128, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    # Not `.to(dtype)`, which would round the rotary frequencies as no loader does.
    model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter[::7] *= 20
    return model


@functools.cache
def _quantized(dtype: str, activations: str, load: torch.dtype) -> Any:
    return qcompile.quantize(llama(load), [IDS, IDS.flip(1)], dtype=dtype, activations=activations)  # type: ignore[arg-type]


def quantized(dtype: str = "int8", activations: str = "token", load: torch.dtype = torch.float32) -> Any:
    """The tiny Llama, quantized; a copy that may be changed."""
    return copy.deepcopy(_quantized(dtype, activations, load))


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def tokenizer() -> Any:
    """One token per character, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<s>", "</s>", *string.ascii_lowercase, *" .,:\n", *string.digits]
    raw = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return made


def float_folder(path: Path, model: Any = None, **options: Any) -> Path:
    """A float model folder with a tokenizer and a calibration text beside it."""
    (model or llama()).save_pretrained(path, **options)
    tokenizer().save_pretrained(path)
    (path.parent / "text.txt").write_text(TEXT * 40, encoding="utf-8")
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level entries of a JSON file; None removes one."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values.update(changes)
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
