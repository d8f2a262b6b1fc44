"""Load quantized checkpoints, ours and others', into QuantizedLinears; and float ones, as carefully."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.checkpoint import formats
from qcompile.checkpoint.folder import CONFIG, Folder, inspect
from qcompile.checkpoint.formats import Layout
from qcompile.errors import CheckpointError, QCompileError
from qcompile.paths import expanded
from qcompile.quantized_experts import quantized_experts
from qcompile.quantized_linear import QuantizedLinear, quantized_linears
from qcompile.record import Record


def from_pretrained(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    checksums: bool = True,
    progress: bool = False,
) -> Any:
    """The model in a quantized folder (or hub name): compressed-tensors or LMDeploy, W8A8, whoever wrote it.

    8-bit weights stay 8-bit: linears become QuantizedLinears, which eager PyTorch runs slowly and
    `torch.compile(model, backend="w8a8")` fast. checksums: compare the files with the digests in qcompile.json, if
    there is one. Raises CheckpointError if anything is missing, damaged, of another kind, or left over.
    """
    folder = open_folder(path, checksums=checksums)
    if folder.quantization_config is None:
        raise CheckpointError(
            f"{path} must be a quantized model; it is a float one; quantize it: qcompile quantize {path}"
        )
    layout = formats.read(folder.quantization_config)
    model = _load(folder, layout, "auto", trust_remote_code, progress)
    _check_loaded(model, layout)
    _share_input_scales(model)
    model.qcompile_record = _record(folder)
    return model.requires_grad_(False).eval().to(device)


def load_float(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Any:
    """The float model in a folder (or hub name), whole and in safetensors. Raises CheckpointError."""
    from qcompile.checkpoint.transformers_quantizer import check_tensors
    from qcompile.structure import load_structure

    folder = open_folder(path)
    if folder.quantization_config is not None:
        raise CheckpointError(f"{path} must be a float model; it is quantized already; take the model it was made from")
    with _quiet(progress=False):
        structure = load_structure(str(folder.path), trust_remote_code=trust_remote_code)
        check_tensors(structure, None, folder.tensors)
    return _load(folder, None, dtype, trust_remote_code, progress).requires_grad_(False).eval().to(device)


def load_either(path: str | Path, **options: Any) -> tuple[Any, bool]:
    """The model in a folder, float or quantized, and whether it is quantized. options: device and trust_remote_code of
    the two loaders. Raises CheckpointError."""
    folder = open_folder(path, checksums=False)
    is_float = folder.quantization_config is None
    return (load_float if is_float else from_pretrained)(folder.path, **options), not is_float


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder. Raises CheckpointError; ConfigError if the model's config keeps it from loading."""
    from transformers import AutoTokenizer

    from qcompile.structure import load_config

    try:
        with _quiet(progress=False):
            return AutoTokenizer.from_pretrained(expanded(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizer files may hold anything
        if (expanded(path) / CONFIG).exists():
            load_config(str(path), trust_remote_code=trust_remote_code)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"{path} must hold a tokenizer that transformers can load; {reason}") from None


def open_folder(path: str | Path, *, checksums: bool = True) -> Folder:
    """A model folder by path or hub name, inspected. Raises CheckpointError."""
    return inspect(resolve(path), checksums=checksums)


def resolve(path: str | Path) -> Path:
    """The folder of a path, or of a hub name: downloaded, or found in the cache. Raises CheckpointError."""
    folder = expanded(path)
    if folder.exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        return folder
    from huggingface_hub import snapshot_download

    try:
        with _quiet(progress=False):
            ignored = ["*.bin", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.gguf", "*.onnx"]
            return Path(snapshot_download(str(path), ignore_patterns=ignored))
    except Exception as error:  # the hub client has many ways to fail: offline, unknown, gated
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"MODEL must be a folder, or a hub name that can be reached; got {path}: {reason[:200]}; give a folder"
        ) from None


def _load(
    folder: Folder, layout: Layout | None, dtype: str | torch.dtype, trust_remote_code: bool, progress: bool
) -> Any:
    """Load through transformers. Whatever it makes of a broken folder becomes one CheckpointError."""
    from qcompile.checkpoint.transformers_quantizer import LoadingConfig

    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        with _quiet(progress=progress):
            config = _config(folder, trust_remote_code)
            if layout is not None:
                loading = LoadingConfig(layout, folder.quantization_config, folder.tensors)
                arguments["quantization_config"] = loading
            model, report = _model_class(config).from_pretrained(
                folder.path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **arguments
            )
    except QCompileError:
        raise
    except Exception as error:  # config.json may ask for anything; transformers has no common error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(f"{folder.path} must hold a model that transformers can load; {reason}") from error
    _check_report(folder, report)
    _check_whole(model)
    return model


def _config(folder: Folder, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    from qcompile.structure import take_quantization

    config = AutoConfig.from_pretrained(folder.path, trust_remote_code=trust_remote_code)
    take_quantization(config)
    return config


def _model_class(config: Any) -> Any:
    import transformers

    name = (getattr(config, "architectures", None) or [""])[0]
    known = getattr(transformers, name, None)
    remote = getattr(config, "auto_map", None)
    return known if known is not None and not remote else transformers.AutoModelForCausalLM


def _check_report(folder: Folder, report: dict[str, Any]) -> None:
    """transformers leaves what it did not find as it was in memory, with a report only."""
    for kind, what in (("missing_keys", "is missing"), ("mismatched_keys", "has another shape")):
        if report.get(kind):
            names_ = sorted(str(key) for key in report[kind])
            raise CheckpointError(f"{folder.path} must hold every tensor of the model; {_few(names_)} {what}")
    if report.get("unexpected_keys"):
        left = _few(sorted(map(str, report["unexpected_keys"])))
        raise CheckpointError(f"{folder.path} must hold the model's tensors only; {left} has no place in it")
    if report.get("error_msgs"):
        raise CheckpointError(f"{folder.path} cannot be loaded: {str(report['error_msgs'])[:300]}")


def _few(found: list[str]) -> str:
    return found[0] if len(found) == 1 else f"{found[0]} (and {len(found) - 1} more)"


def _check_whole(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise CheckpointError(f"every tensor must be loaded; {name} was not")


def _check_loaded(model: nn.Module, layout: Layout) -> None:
    """Dtypes, and scales that can be scales; brings the scales in form."""
    from qcompile.checkpoint.transformers_quantizer import spread

    for name, module in quantized_linears(model).items():
        scheme = layout.scheme_of(name, ["Linear", "Conv1D"])
        if scheme is not None and module.weight.dtype != scheme.torch_dtype:
            raise CheckpointError(f"{name}.weight must be {scheme.torch_dtype}; got {module.weight.dtype}")
        if module.weight_scale.dtype != torch.float32:
            raise CheckpointError(f"{name}.weight_scale must be floating point; got {module.weight_scale.dtype}")
        spread(module)
        for scale in (module.weight_scale, module.input_scale):
            if scale is not None and not bool(((scale > 0) & scale.isfinite()).all()):
                raise CheckpointError(f"scales must be finite and positive; one of {name} is not; get the file again")
        _check_finite(f"{name}.weight", module.weight)
    for name, experts in quantized_experts(model).items():
        for stack in experts.quantized_stacks():
            weight, scale = getattr(experts, stack), getattr(experts, f"{stack}_scale")
            if weight.dtype.itemsize > 1 or scale.dtype != torch.float32:
                raise CheckpointError(
                    f"{name}.{stack} must be in 8 bits, its scales floating point; got {weight.dtype}, {scale.dtype}"
                )
            if not bool(((scale > 0) & scale.isfinite()).all()):
                raise CheckpointError(
                    f"scales must be finite and positive; one of {name}.{stack} is not; get the file again"
                )
            _check_finite(f"{name}.{stack}", weight)


def _check_finite(name: str, weight: Tensor) -> None:
    for part in weight if weight.dtype.is_floating_point else ():
        if not bool(part.to(torch.float32).isfinite().all()):
            raise CheckpointError(f"weights must be finite; {name} has NaN or Inf; get the file again")


def _share_input_scales(model: nn.Module) -> None:
    """Siblings with equal static scales share one object, so that a graph sees that they read one quantized tensor."""
    for parent in model.modules():
        shared: dict[float, nn.Parameter] = {}
        for child in parent.children():
            if isinstance(child, QuantizedLinear) and child.input_scale is not None:
                child.input_scale = shared.setdefault(float(child.input_scale), child.input_scale)


def _record(folder: Folder) -> Record | None:
    values = folder.record.get("record")
    try:
        return Record.from_dict(values) if isinstance(values, dict) else None
    except TypeError:
        return None


@contextlib.contextmanager
def _quiet(*, progress: bool) -> Iterator[None]:
    """transformers without its reports and, unless wanted, its progress bars: what matters is raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    (logging.enable_progress_bar if progress else logging.disable_progress_bar)()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
