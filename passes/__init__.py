"""Graph passes: target-free rewrites of functional ATen graphs. README.md states what every pass may rely on."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from qcompile.config import Config
from qcompile.pass_pipeline import Pipeline
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.eliminate_dead import EliminateDead
from qcompile.passes.find_linears import FindLinears
from qcompile.passes.fuse_epilogues import FuseEpilogues
from qcompile.passes.insert_observers import InsertObservers
from qcompile.passes.merge_siblings import MergeSiblings
from qcompile.passes.quantize_linears import QuantizeLinears
from qcompile.passes.share_quantize import ShareQuantize
from qcompile.passes.simplify_attention import SimplifyAttention
from qcompile.passes.smooth import Smooth

PASSES: tuple[type[Any], ...] = (
    Canonicalize,
    FindLinears,
    InsertObservers,
    Smooth,
    QuantizeLinears,
    ShareQuantize,
    MergeSiblings,
    FuseEpilogues,
    SimplifyAttention,
    EliminateDead,
)


def observing(config: Config) -> Pipeline:
    """The passes of a calibration run."""
    return Pipeline(
        (
            Canonicalize(),  # first: every later pass knows one spelling of a linear
            FindLinears(config.ignore),  # decides which inputs are worth watching
            InsertObservers(),  # after find_linears, which groups the linears that share an input
            EliminateDead(),
        )
    )


def smoothing(config: Config) -> Pipeline:
    """The passes that smooth a model's own parameters."""
    return Pipeline(
        (
            Canonicalize(),
            FindLinears(config.ignore),
            dataclasses.replace(_smooth(config), absorb=False, edit="parameter"),  # float out: nothing runs at run time
        )
    )


def storing(config: Config, keep: Iterable[str] = ()) -> Pipeline:
    """The passes that smooth a model's own parameters and quantize what a checkpoint will hold. keep: names of linears
    that stay in float."""
    smooth = smoothing(config).passes[-1:] if config.smooths else ()
    return Pipeline(
        (
            Canonicalize(),
            FindLinears(config.ignore, tuple(keep)),
            *smooth,  # before quantize_linears: the identity holds for float linears
            QuantizeLinears(config.dtype, config.activations, config.clip, round_scales=True),  # as a file stores them
        )
    )


def quantizing(config: Config) -> Pipeline:
    """The passes of a quantized run."""
    smooth = (_smooth(config),) if config.smooths else ()
    return Pipeline(
        (
            Canonicalize(),  # first: every later pass knows one spelling of a linear
            FindLinears(config.ignore),  # after canonicalize: reads aten.linear only
            *smooth,  # before quantize_linears: the identity holds for float linears
            QuantizeLinears(config.dtype, config.activations, config.clip),  # after smooth: takes its factors
            ShareQuantize(),  # after quantize_linears, which quantizes each linear's input for itself
            MergeSiblings(),  # after share_quantize: siblings are those that read one quantized tensor
            FuseEpilogues(),  # after merge_siblings: an epilogue belongs to one GEMM's result
            SimplifyAttention(),  # after smooth, which reads torch's own operators
            EliminateDead(),  # last: the rewrites leave unread float weights and masks behind
        )
    )


def _smooth(config: Config) -> Smooth:
    assert config.alpha is not None
    if config.alpha == "auto":  # compares the products that this very config will run
        return Smooth("auto", power_of_two=config.power_of_two, dtype=config.dtype, activations=config.activations)
    return Smooth(float(config.alpha), power_of_two=config.power_of_two)
