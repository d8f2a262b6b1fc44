"""Warm start: what capture, passes and lowering made of a graph is kept on disk, so the next process skips them.

An entry lies beside Inductor's own cache, under the graph's key (key.py): the lowered graph, the graph that prepares
weights, the graph that calibrates. It holds no weight and nothing pickled. Inductor compiles the lowered graph as ever,
and finds it in its cache. docs/cpu.md says when a graph is not kept.
"""

import dataclasses
import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from qcompile.atomic_file import replacing
from qcompile.capture import Around
from qcompile.errors import GraphError
from qcompile.lowering.cpu_library import load_for
from qcompile.lowering.partition import Partition, Prepared
from qcompile.rewrite import is_symbolic
from qcompile.saved_graph.file import read_archive, under, write_archive
from qcompile.saved_graph.nodes import describe, restore, tuples
from qcompile.saved_graph.values import LOWERED
from qcompile.stages import Stages

FORMAT = "qcompile-compiled-1"
SWITCH = "QCOMPILE_CACHE"  # 0: graphs are neither kept nor looked for
log = logging.getLogger(__name__)


def enabled() -> bool:
    """Whether graphs are kept; not if Inductor keeps none."""
    from torch._inductor import config

    wanted = os.environ.get(SWITCH, "1") != "0" and config.fx_graph_cache
    return wanted and not torch.compiler.config.force_disable_caches


def path_of(key: str) -> Path:
    """Where the entry of a key lies."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "qcompile" / key[:2] / f"{key}.zip"


def save(key: str, stages: Stages) -> None:
    """Keep a graph; one that has no form on disk, or a disk that takes none, is noted in the log."""
    try:
        described, tensors = _described(stages)
        path = path_of(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, GraphError) as partial:
            write_archive(partial, described, tensors)
    except (GraphError, OSError) as error:
        log.info("a compiled graph is not kept: %s", error)
        _count("not_kept")
    except Exception as error:  # a cache must not break a model
        log.warning("a compiled graph is not kept: %s: %s", type(error).__name__, error)
        _count("not_kept")
    else:
        _count("kept")


def _described(stages: Stages) -> tuple[dict[str, Any], dict[str, Tensor]]:
    assert stages.partition is not None
    if stages.around is None:
        raise GraphError("a call of it needs more than the graph, such as outputs made anew as views of inputs")
    graphs = {"run": stages.partition.run, "prepare": stages.partition.prepare}
    if stages.observed is not None:
        graphs["observed"] = stages.observed
    described: dict[str, Any] = {
        "format": FORMAT,
        "graphs": {},
        "prepared": [[entry.node.name, entry.digest, entry.leaves] for entry in stages.partition.prepared],
        "run_inputs": stages.partition.run_inputs,
        "kernels": stages.kernels,
        "around": dataclasses.asdict(stages.around),
    }
    tensors: dict[str, Tensor] = {}
    for name, gm in graphs.items():
        if any(map(is_symbolic, gm.graph.nodes)):
            raise GraphError("it has symbolic sizes")
        described["graphs"][name], constants = describe(gm, LOWERED)
        for constant, value in constants.items():
            if not value.is_contiguous() or value.device.type != "cpu":
                raise GraphError(f"its constant {constant} is not a plain tensor on the CPU")
            tensors[f"{name}/{constant}"] = value
    return described, tensors


def load(key: str, fake_mode: FakeTensorMode) -> Stages | None:
    """The entry of a key, or None if there is none that can be read. fake_mode: what the graphs' values belong to."""
    path = path_of(key)
    try:
        with zipfile.ZipFile(path) as archive:
            stages = _stages(*read_archive(archive, FORMAT), fake_mode)
    except FileNotFoundError:
        stages = None
    except Exception as error:  # a damaged entry may fail anywhere, and compiling anew mends it
        log.warning("%s cannot be read and is written anew: %s: %s", path, type(error).__name__, error)
        stages = None
    _count("miss" if stages is None else "hit")
    return stages


def _stages(described: Mapping[str, Any], tensors: Mapping[str, Tensor], fake_mode: FakeTensorMode) -> Stages:
    graphs = {
        name: restore(graph, under(tensors, f"{name}/"), fake_mode, LOWERED)
        for name, graph in described["graphs"].items()
    }
    load_for(graphs["run"].graph)
    nodes = {node.name: node for node in graphs["prepare"].graph.nodes}
    prepared = tuple(Prepared(nodes[name], digest, tuple(leaves)) for name, digest, leaves in described["prepared"])
    partition = Partition(graphs["prepare"], prepared, graphs["run"], tuple(described["run_inputs"]))
    around = Around(**{key: tuples(value) for key, value in described["around"].items()})
    return Stages(graphs.get("observed"), partition, described["kernels"], around)


def _count(event: str) -> None:
    """As torch counts its own caches: torch._dynamo.utils.counters["qcompile"]."""
    torch._dynamo.utils.counters["qcompile"][f"graph_cache_{event}"] += 1
