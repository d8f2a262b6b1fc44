"""Inductor's code for a GPU that is not here: torch and Triton are told that there is one, and nothing is launched."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch._inductor.fx_passes.joint_graph
import torch._inductor.scheduler
import torch.cuda.random
import triton
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

from qcompile.backend import for_inductor
from qcompile.lowering.inductor import compile_inductor, decompositions
from qcompile.lowering.target import Target


@dataclasses.dataclass(frozen=True)
class _Properties:
    major: int
    minor: int
    name: str = "absent"
    multi_processor_count: int = 132
    regs_per_multiprocessor: int = 65536
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    warp_size: int = 32
    total_memory: int = 2**36
    shared_memory_per_block: int = 48 * 1024
    shared_memory_per_block_optin: int = 227 * 1024
    L2_cache_size: int = 50 * 2**20
    gcnArchName: str = ""


class _Driver:
    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0


@contextlib.contextmanager
def pretended(target: Target) -> Iterator[None]:
    """As if the target were cuda:0."""
    properties = _Properties(*divmod(target.capability, 10))
    stand_ins: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "current_device": lambda: 0, "device_count": lambda: 1, "is_available": lambda: True,
            "get_device_properties": lambda device=None: properties, "_get_device_properties": lambda index: properties,
            "get_device_capability": lambda device=None: (properties.major, properties.minor),
            "_lazy_init": lambda: None, "_exchange_device": lambda index: 0, "_maybe_exchange_device": lambda index: 0,
            "set_device": lambda index: None, "synchronize": lambda *device: None,
            "get_rng_state": lambda *device: torch.zeros(8, dtype=torch.uint8), "set_rng_state": lambda *state: None,
        },
        torch._subclasses.fake_tensor: {"init_gpu_context": lambda device: None},
        torch._inductor.scheduler: {"has_triton": lambda: True},
        torch._inductor.fx_passes.joint_graph: {"lazy_init": lambda *device: None},  # makes patterns of real tensors
        triton.runtime.driver: {"_active": _Driver(target.capability)},
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for module, names in stand_ins.items():
            for name, stand_in in names.items():
                stack.enter_context(mock.patch.object(module, name, stand_in, create=True))
        yield


class _Stop(Exception):
    pass


class _Moving(Interpreter):
    """Runs a graph with the tensors that it makes on cuda:0."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("cuda:0")}
        return super().call_function(target, args, kwargs)


def on_cuda(gm: GraphModule) -> GraphModule:
    """The graph traced again with fake inputs on cuda:0."""
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    with torch._subclasses.FakeTensorMode():
        fakes = [torch.empty_like(_strided(node.meta["val"]), device="cuda:0") for node in placeholders]
        moved: GraphModule = make_fx(_Moving(gm).run, decomposition_table=decompositions())(*fakes)
    for old, new in zip(placeholders, moved.graph.find_nodes(op="placeholder"), strict=True):
        new.meta["input"] = old.meta.get("input")
    return moved


def _strided(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def inductor_source(run: GraphModule, target: Target) -> str:
    """The Python that Inductor writes for a lowered run graph: its kernels, and the function that launches them."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    written: list[str] = []

    def write_only(self: Any) -> None:
        code, _ = self.codegen()
        written.append(code.value)
        raise _Stop

    quiet = warnings.catch_warnings(action="ignore", category=UserWarning)  # advice on tf32
    with pretended(target), mock.patch.object(GraphLowering, "compile_to_module", write_only), quiet:
        opened = for_inductor(on_cuda(run))
        with config.patch(fx_graph_cache=False, joint_graph_constant_folding=False):  # which computes, on the GPU
            try:
                compile_inductor(opened, [], None)
            except Exception:  # Inductor wraps the one above
                if not written:
                    raise
    return written[0]
