"""Write a quantized model as a Hugging Face folder that other engines read."""

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.atomic_folder import atomic_folder, check_target
from qcompile.checkpoint import formats, safetensors_writer
from qcompile.checkpoint.folder import CONFIG, INDEX, PICKLES, RECORD, WEIGHTS, digest
from qcompile.checkpoint.formats import SCALE_NAMES, Format, Scheme
from qcompile.checkpoint.model_card import model_card
from qcompile.checkpoint.original_names import matrices_of, original_names
from qcompile.errors import CheckpointError
from qcompile.names import original
from qcompile.ops import QUANTIZED_MAX, TORCH_DTYPES
from qcompile.parallel.row_parallel import RowParallelLinear
from qcompile.paths import expanded
from qcompile.quantized_experts import quantized_experts
from qcompile.quantized_linear import is_quantized, quantized_linears
from qcompile.record import Record

SHARD = 4 * 2**30
LARGEST_COPIED = 256 * 2**20
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"  # where transformers keeps all but the default one
# What belongs to the float model, or is written anew.
NOT_COPIED = (CONFIG, RECORD, "README.md", "*.safetensors", "*.index.json", *PICKLES, "*.msgpack", "*.h5", "*.gguf")


def save_pretrained(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: Any = None,
    format: Format = "compressed-tensors",
    source: str | Path | None = None,
    overwrite: bool = False,
    shard_size: int = SHARD,
) -> Path:
    """Write `model`, quantized by `qcompile.quantize` or loaded by `from_pretrained`; returns the folder.

    source: folder of the float model; its tokenizer, chat template, generation config and code files are copied along.
    tokenizer: written as well. shard_size: most bytes in one weight file.
    overwrite: replace a model folder that is there, if it neither is nor holds `source`.
    The folder appears complete or not at all. Raises CheckpointError: a model that is not quantized, an output that
    exists, a model that is not of transformers, a scheme that the format cannot express, no space; then nothing is left
    behind.
    """
    target, model = expanded(path), original(model)
    linears = quantized_linears(model)
    if not is_quantized(model):
        raise CheckpointError(f"save_pretrained needs a quantized model; {type(model).__name__} is float; quantize it")
    if any(isinstance(module, RowParallelLinear) for module in model.modules()):
        raise CheckpointError("save_pretrained needs a whole model; this is one process's share; load it anew")
    _check_class(model)
    rules: dict[str, Any] = {"overwrite": overwrite, "last": CONFIG, "read": [expanded(source)] if source else []}
    check_target(target, **rules)
    tensors = _tensors(model, format)
    stored = quantization_config(model, format, tensors)
    with atomic_folder(target, **rules) as folder:
        files = _write_weights(folder, tensors, shard_size)
        if source is not None:
            _copy_companions(expanded(source), folder)
        _write_companions(model, tokenizer, folder)
        record = getattr(model, "qcompile_record", None)
        _write_record(folder, record, files)
        card = model_card(record, stored, len(linears), title=target.resolve().name)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / f"{CONFIG}.partial").write_text(_config_text(model, stored), encoding="utf-8")
    return target


def _check_class(model: nn.Module) -> None:
    """Raises CheckpointError for what transformers cannot load again, wrappers that show another's config included."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise CheckpointError(
            f"a model folder must hold a model of transformers; got {type(model).__name__}; save its state_dict, or "
            "merge an adapter before the model is quantized"
        )


def quantization_config(model: nn.Module, format_: Format, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What config.json says about a model's quantization. tensors: what is stored. Raises CheckpointError."""
    kinds = ["Linear"]
    if any(linear.is_conv1d for linear in quantized_linears(model).values()):
        kinds.append("Conv1D")
    return formats.write(format_, schemes(model), _in_float(model, tensors), kinds)


def _in_float(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of what others may take for quantized linears: the model's float ones, and matrices that its files name
    apart from its modules (experts, which transformers fuses while loading)."""
    modules = dict(model.named_modules())
    found = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    for key, tensor in tensors.items():
        owner, _, attribute = key.rpartition(".")
        if attribute == "weight" and tensor.ndim == 2 and owner not in modules and tensor.dtype not in QUANTIZED_MAX:
            found.append(owner)
    return found


def schemes(model: nn.Module) -> dict[Scheme, list[str]]:
    """Names of the quantized linears of a model, by scheme."""
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    found: dict[Scheme, list[str]] = {}
    for name, module in quantized_linears(model).items():
        found.setdefault(Scheme(names[module.weight.dtype], module.input_scale is not None), []).append(name)
    for name, experts in quantized_experts(model).items():
        for stack in experts.quantized_stacks():
            stored = matrices_of(model, f"{name}.{stack}")
            found.setdefault(Scheme(names[getattr(experts, stack).dtype], static=False), []).extend(stored)
    return found


def _tensors(model: nn.Module, format_: Format) -> dict[str, Tensor]:
    """What is stored, by the names that the model's files have."""
    formats.check_name(format_)
    tensors = stored_names(model, format_)
    for name in _tied(model):
        tensors.pop(name, None)
    apart: dict[str, Tensor] = {}
    for name, experts in quantized_experts(model).items():
        for stack in experts.quantized_stacks():
            scale = _stored(tensors.pop(f"{name}.{stack}_scale"), getattr(model, "dtype", torch.float32), format_)
            apart |= _taken_apart(model, f"{name}.{stack}", scale, SCALE_NAMES[format_])
    return original_names(model, tensors) | apart


def stored_names(model: nn.Module, format_: Format) -> dict[str, Tensor]:
    """The model's tensors, scales of linears as a format has them. Scales that siblings share are stored for each."""
    tensors: dict[str, Tensor] = model.state_dict()
    for name, linear in quantized_linears(model).items():
        dtype = linear.bias.dtype if linear.bias is not None else getattr(model, "dtype", torch.float32)
        scale = tensors.pop(f"{name}.weight_scale")
        tensors[f"{name}.{SCALE_NAMES[format_]}"] = _stored(scale, dtype, format_)
        if linear.input_scale is not None:
            tensors[f"{name}.input_scale"] = tensors[f"{name}.input_scale"].clone()
    return tensors


def _taken_apart(model: nn.Module, stack: str, scale: Tensor, name: str) -> dict[str, Tensor]:
    """The scales [E, N, 1] of a stack of experts as files hold them: of each expert's matrix, as the stack itself is
    taken apart."""
    parts = original_names(model, {stack: scale})
    # transformers 5.17 drops every dimension of size 1.
    return {f"{weight.removesuffix('.weight')}.{name}": part.reshape(-1, 1) for weight, part in parts.items()}


def _tied(model: nn.Module) -> list[str]:
    """Tensors that loading ties again."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    tensors = model.state_dict(keep_vars=True)
    return [name for name, source in tied.items() if tensors.get(name) is tensors.get(source)]


def _stored(scale: Tensor, dtype: torch.dtype, format_: Format) -> Tensor:
    """Scales in the model's dtype, which they were rounded to before anything was quantized with them; LMDeploy has
    them in float32."""
    narrow = scale.to(dtype)
    return narrow if format_ != "lmdeploy" and torch.equal(narrow.to(torch.float32), scale) else scale


def _write_weights(folder: Path, tensors: dict[str, Tensor], shard_size: int) -> list[Path]:
    shards = safetensors_writer.split(tensors, shard_size)
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, shard in zip(names, shards, strict=True):
        safetensors_writer.write(folder / file, {name: tensors[name] for name in shard}, {"format": "pt"})
    if count > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return [folder / name for name in names]


def _copy_companions(source: Path, folder: Path) -> None:
    """Everything small beside the float weights: tokenizer, chat template, generation config, code, licence."""
    for file in sorted([*source.iterdir(), *source.glob(CHAT_TEMPLATES)]):
        skipped = any(file.match(pattern) for pattern in NOT_COPIED) or file.name.startswith(".")
        if file.is_file() and not skipped and file.stat().st_size <= LARGEST_COPIED:
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def _write_companions(model: Any, tokenizer: Any, folder: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None and not (folder / "generation_config.json").exists():
        (folder / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")


def _write_record(folder: Path, record: Record | None, files: Sequence[Path]) -> None:
    values = {
        "record": None if record is None else json.loads(record.to_json()),
        "sha256": {file.name: digest(file) for file in files},
    }
    (folder / RECORD).write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")


def _config_text(model: Any, stored: dict[str, Any]) -> str:
    config = copy.deepcopy(model.config)
    config.quantization_config = stored
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    return str(config.to_json_string())
