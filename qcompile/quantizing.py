"""Quantize a model in place: the compile entrance's capture, passes and quantizer, kept as a model.

Linears become `QuantizedLinear`s one after the other, and experts `QuantizedExperts` stack by stack, each float weight
going as its 8-bit one comes. Smoothing is folded into the parameters that are left; what nothing can absorb stays
unsmoothed, since a checkpoint has no place for it.
"""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from qcompile import names, passes
from qcompile.calibration import Batches, Calibration, statistic_for
from qcompile.capture import Captured
from qcompile.checkpoint.original_names import matrices_of
from qcompile.config import Clip, Config, Dtype
from qcompile.dry_run import must_stay_float
from qcompile.errors import ConfigError
from qcompile.experts_replacement import ExpertsReplacement
from qcompile.linear_replacement import LinearReplacement
from qcompile.memory import give_back
from qcompile.ops import TORCH_DTYPES
from qcompile.parameter_edits import ParameterEdits
from qcompile.pass_pipeline import Pipeline
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.find_linears import FindLinears, info_of, is_grouped, linears
from qcompile.quantized_experts import STACKS, why_not_quantized
from qcompile.quantized_linear import QuantizedLinear, is_quantized
from qcompile.record import Record
from qcompile.recording import calibrate
from qcompile.rewrite import input_of, module_of
from qcompile.smoothing import example_arguments, rewritten, whole_graph, with_example
from qcompile.validate import relative_error

NEARLY_EQUAL = 1e-6  # where a forward computes in float32


def quantize(
    model: nn.Module,
    calibration: Calibration | Batches,
    *,
    dtype: Dtype = "int8",
    activations: Literal["token", "static"] = "token",
    alpha: float | Literal["auto"] | None = 0.5,
    clip: Clip = "none",
    ignore: tuple[str, ...] = ("lm_head",),
    example: Mapping[str, Any] | Tensor | None = None,
    progress: bool = False,
) -> nn.Module:
    """Quantize `model`'s linears in place; returns it. Their float weights are freed as they go.

    calibration: batches to record, as for `calibrate`, or what it returned for this very model. The other options are
    those of Config; alpha=None means no smoothing. example: the call that the model is captured with, instead of the
    calibration's first; it must be one graph. progress: show progress bars on stderr.
    Linears that are no nn.Linear or Conv1D of their own, match `ignore`, or have no part in that call stay in float;
    `model.qcompile_record` says which, why, and what was done. The model is for inference only then.
    Raises ConfigError, CalibrationError (the calibration belongs to another model), CaptureError (no single graph),
    WeightError (not finite, or an overflow) or, if QCOMPILE_DEBUG has verify, VerifyError; then nothing was changed.
    """
    model = names.original(model)
    _check(model, activations)
    # With a number for the batches to come, so that mistakes show before the long part.
    config = Config(dtype=dtype, activations=activations, alpha=alpha, clip=clip, ignore=ignore, calibrate=1)
    if not isinstance(calibration, Calibration):
        calibration = calibrate(model, calibration, ignore=config.ignore, progress=progress)
    calibration = with_example(calibration, model, example)
    config = dataclasses.replace(config, calibrate=0, calibration=calibration)
    give_back(collect=True)
    captured = whole_graph(model, calibration)
    unseen = _unseen(model, captured)
    placeless = _placeless(model, captured, config, example_arguments(model, calibration))
    config = dataclasses.replace(config, ignore=(*config.ignore, *placeless))
    statistic = functools.partial(statistic_for, calibration, activations)
    gm, refusals = rewritten(captured, passes.storing(config), statistic)
    edits = ParameterEdits(gm, captured.args, statistic)
    captured.args.clear()  # Dynamo may keep what captured it, and with it the float weights
    give_back()
    replacements: list[LinearReplacement | ExpertsReplacement] = [
        LinearReplacement(model, edits), ExpertsReplacement(model, edits),
    ]  # fmt: skip
    record = Record.of(config, placeless, refusals, unseen)
    if not any(map(len, replacements)):
        reason = next(iter(record.kept.items()), ("it", "has no linears"))
        raise ConfigError(f"no linear of {type(model).__name__} can be quantized; {': '.join(reason)}")
    edits.check()
    for replacement in replacements:
        replacement.check()
    edits.write()
    with _bar(sum(map(len, replacements)), progress) as advance:
        for replacement in replacements:
            replacement.write(advance)
    _untie(model)
    model.requires_grad_(False)
    model.qcompile_record = record  # type: ignore[assignment]
    return model


def _check(model: nn.Module, activations: str) -> None:
    """Raises ConfigError for a quantized model, and for activations that no file can hold."""
    if is_quantized(model) or getattr(model, "quantization_method", None) is not None:
        raise ConfigError(f"{type(model).__name__} is already quantized; quantize the float model it was made from")
    if activations not in ("token", "static"):
        raise ConfigError(f'activations of a stored model must be "token" or "static"; got {activations!r}')


def _unseen(model: nn.Module, captured: Captured) -> dict[str, str]:
    """Linears that nothing of a captured graph reads, and why they stay in float."""
    placeholders = captured.graph.graph.find_nodes(op="placeholder")
    read = {id(captured.args[input_of(node).index]) for node in placeholders if node.users}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, _conv1d()))}
    weights = {name: module._parameters.get("weight") for name, module in linears.items()}  # none if parametrized
    reason = "nothing that the example call returns depends on it"
    return {name: reason for name, weight in weights.items() if weight is not None and id(weight) not in read}


def _placeless(model: nn.Module, captured: Captured, config: Config, call: dict[str, Any]) -> dict[str, str]:
    """Linears that the passes would quantize but that no module can hold, by name, and why."""
    gm, _ = Pipeline((Canonicalize(), FindLinears(config.ignore))).run(captured.graph)
    found, modules = {}, {}
    for node in linears(gm):
        info = info_of(node)
        if info.quantize and info.parameter is not None:
            weight = captured.args[info.parameter]
            if is_grouped(node):
                reason = _why_no_stack(model, info.name, weight, config)
            else:
                reason = _why_placeless(model, node, weight)
            if reason:
                found[info.name] = reason
            elif not is_grouped(node):
                modules[info.name] = model.get_submodule(module_of(node))
    unfit = must_stay_float(model, {*modules.values()}, TORCH_DTYPES[config.dtype], call)
    reason = "the model's code depends on the dtype of its weight"
    return found | {name: reason for name, module in modules.items() if module in unfit}


def _why_placeless(model: nn.Module, linear: Node, weight: Tensor) -> str:
    """Why the module in whose forward a linear was written cannot become a QuantizedLinear; empty if it can."""
    try:
        module = model.get_submodule(module_of(linear))
    except AttributeError:
        return "it is not written in a module of the model"
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return "its module has forward hooks"
    if module._parameters.get("weight") is not weight or not is_plain_linear(module):
        return "its weight is not read by an nn.Linear or Conv1D of its own"
    if linear.meta["val"].shape[-1] == 1:
        return "it has one output, which engines that read folders keep in float (a gate)"
    return ""


def _why_no_stack(model: nn.Module, name: str, weight: Tensor, config: Config) -> str:
    """Why a stack of experts cannot be held in 8 bits; empty if it can."""
    owner, _, stack = name.rpartition(".")
    module = model.get_submodule(owner)
    if stack not in STACKS or module._parameters.get(stack) is not weight:
        return "it is not a stack that a module of experts holds"
    if config.activations == "static":
        return "experts have activations per token only"
    if reason := why_not_quantized(module):
        return reason
    if not matrices_of(model, name):
        return "the model's files hold it as one tensor, for which formats have no scales"
    return ""


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes a linear and nothing else: nn.Linear, Conv1D, or a subclass of nn.Linear that spells
    the same forward in its own way, as Falcon's, which its values at random points show."""
    if type(module).forward in (nn.Linear.forward, _conv1d().forward):
        return True
    alone = isinstance(module, nn.Linear) and not [*module.children()] and {*module._parameters} == {"weight", "bias"}
    return alone and len(inspect.signature(module.forward).parameters) == 1 and _agrees_with_linear(module)


def _conv1d() -> type[nn.Module]:
    """transformers' Conv1D, which exists once transformers is imported."""
    found: type[nn.Module] = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", nn.Linear)
    return found


@torch.no_grad()
def _agrees_with_linear(module: nn.Module) -> bool:
    """Whether a module's forward of random x [..., K] is x · Wᵀ + bias, small or large."""
    parameters = {name: p.double() for name, p in module.named_parameters()}
    weight, bias = parameters["weight"], parameters.get("bias")
    generator = torch.Generator(weight.device).manual_seed(0)
    noise = torch.randn(2, 4, weight.shape[1], generator=generator, device=weight.device, dtype=torch.float64)
    for x in (noise, noise[0], 1e-4 * noise, 1e4 * noise):
        try:
            found = torch.func.functional_call(module, parameters, (x,))
        except Exception:  # whatever its code makes of x
            return False
        expected = nn.functional.linear(x, weight, bias)
        same = isinstance(found, Tensor) and found.shape == expected.shape
        if not same or relative_error(found, expected) > NEARLY_EQUAL:
            return False
    return True


def _untie(model: nn.Module) -> None:
    """A quantized head shares no weight with the embedding it was tied to; transformers must not tie them again."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name in [key for pair in tied.items() for key in pair]:
        if isinstance(model.get_submodule(name.rpartition(".")[0]), QuantizedLinear):
            model.config.tie_word_embeddings = False  # type: ignore[union-attr]
            for key in [key for key, source in tied.items() if name in (key, source)]:
                del tied[key]


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("quantizing", total=total)
        yield lambda: progress.advance(task)
