"""Inductor's choices on NVIDIA GPUs: a row that fits is held by one program, which reads it once.

Norm + quantize goes over its row three times: for the mean square, the largest magnitude and the values. Where rows
have more than 1,024 elements Inductor writes a loop for each, and every loop reads the row and computes the norm again.
Where there are few rows, of more than 8,192 elements, it makes three kernels of one: a part of a row each, the parts
together, the values.

These are hooks of `InductorChoices`, whose other arguments differ between versions of torch and are passed on.
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

# Inductor gives rows of up to 8,192 elements 256 threads and longer ones 512, and Triton a thread up to 32 elements: at
# most 88 registers on sm90. With 32,768 elements layer norm + quantize spills.
LONGEST_ROW = 16384
# Above it Inductor's only configuration of a persistent kernel has one row per program; below, several that it times.
SHORTEST_ROW = 512
# argmax, argmin, scans and sorts keep a second value per element.
KINDS = frozenset({"sum", "max", "min", "any", "welford_reduce", "online_softmax_reduce"})


class WholeRows(InductorChoices):
    """One program to a row, if the row's length is known and not above LONGEST_ROW; otherwise as Inductor does it."""

    def should_use_persistent_reduction(  # type: ignore[override]
        self, features: Any, cooperative_reduction: bool, *args: Any, **kwargs: Any
    ) -> bool:
        if super().should_use_persistent_reduction(features, cooperative_reduction, *args, **kwargs):
            return True
        return config.triton.persistent_reductions and not cooperative_reduction and _fits(features)

    def reduction_split_factor(  # type: ignore[override]
        self,
        device: torch.device,
        reduction_numel_hint: int,
        numel_hint: int,
        inner_reduction: bool,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        if inner_reduction and device.type == "cuda" and reduction_numel_hint <= LONGEST_ROW:
            return 1
        return super().reduction_split_factor(
            device, reduction_numel_hint, numel_hint, inner_reduction, *args, **kwargs
        )


def _fits(features: Any) -> bool:
    length, sizes = features.reduction_numel, V.graph.sizevars
    return (
        sizes.statically_known_leq(length, LONGEST_ROW)
        and sizes.statically_known_gt(length, SHORTEST_ROW)
        and KINDS.issuperset(node.node.get_reduction_type() for node in features.reduction_nodes())
        and _along_rows(features)
    )


def _along_rows(features: Any) -> bool:
    """Whether neighbours in a row are neighbours in memory. Inductor does not ask where there are many rows."""
    hint = features.get_reduction_hint()
    if hint != ReductionHint.DEFAULT:
        return bool(hint == ReductionHint.INNER)
    return bool(features.memory_stats().persistent.memory.dim[-1].count_per_thread_non_contiguous == 0)


@contextlib.contextmanager
def whole_rows() -> Iterator[None]:
    """What Inductor compiles in this thread takes these choices, and is cached apart from what it compiles otherwise.

    Choices that somebody else has installed stay.
    """
    if type(V.choices) is not InductorChoices:
        yield
        return
    # Inductor's key for compiled graphs has no entry for a handler.
    tag = f"{torch.compiler.config.cache_key_tag}{_fingerprint()}"
    tagged = torch.compiler.config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]
    with V.set_choices_handler(WholeRows()), tagged:
        yield


@functools.cache
def _fingerprint() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
