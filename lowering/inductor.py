"""Hand a lowered graph to Inductor, as torch.compile's own backend would."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from qcompile.lowering.tiles import MOST_PARTS
from qcompile.rewrite import args_of, fake_mode_of, output_of

Boxed = Callable[[list[Any]], Any]
KNOWN = {"aten", "prims", "_c10d_functional", "qcompile", "qcompile_cpu", "qcompile_triton"}  # operators' namespaces


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What Inductor wants decomposed before it lowers a graph."""
    from torch._inductor.decomposition import select_decomp_table

    return dict(select_decomp_table())


def compile_inductor(gm: GraphModule, static_inputs: Sequence[int], mode: str | None) -> Boxed:
    """Compile a functional, decomposed graph. static_inputs: positions of weights, which never move."""
    from torch._inductor import config
    from torch._inductor.compile_fx import _recursive_joint_graph_passes, compile_fx_inner
    from torch._inductor.cudagraph_utils import BoxedDeviceIndex
    from torch._inductor.utils import BoxedBool
    from torch._inductor.virtualized import V

    fakes = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    device = _device(fakes)
    cuda_graphs = mode in ("reduce-overhead", "max-autotune") and device.type == "cuda"
    patches: dict[str, Any] = {} if _compares_sizes(gm) else {"size_asserts": False}
    if mode and mode.startswith("max-autotune"):
        patches["max_autotune"] = True
    if device.type == "cuda":
        patches["unroll_reductions_threshold"] = MOST_PARTS + 1  # parts of K are summed where the sum is read
    if cuda_graphs:
        patches["triton.cudagraphs"] = True  # or Inductor's partitions count as not fit for them
    with config.patch(patches), V.set_fake_mode(fake_mode_of(gm)), _no_autocast(), _on_gpu(device):
        gm = _recursive_joint_graph_passes(gm, input_device=device)
        output = output_of(gm.graph)
        results = args_of(output)[0]
        output.meta["user_visible_output_idxs"] = [
            index for index, node in enumerate(results) if isinstance(node, torch.fx.Node)
        ]
        return compile_fx_inner(
            gm,
            fakes,
            static_input_idxs=list(static_inputs),
            cudagraphs=BoxedBool(cuda_graphs),
            is_inference=True,
            boxed_forward_device_index=BoxedDeviceIndex(None),
        )


def _compares_sizes(gm: GraphModule) -> bool:
    """Whether Inductor compares every operand's size and strides with what it assumed, at each call and in each region.

    That takes time, and Dynamo has guarded the inputs, and bindings prepared the weights. It stays if asked for by
    TORCHINDUCTOR_SIZE_ASSERTS=1 (guards can be switched off), and where operators are others', whose fakes may lie.
    """
    targets = [node.target for part in gm.modules() if isinstance(part, GraphModule) for node in part.graph.nodes]
    namespaces = {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}
    return os.environ.get("TORCHINDUCTOR_SIZE_ASSERTS") == "1" or not namespaces <= KNOWN


def _device(fakes: list[Any]) -> torch.device:
    devices = [fake.device for fake in fakes if isinstance(fake, torch.Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


@contextlib.contextmanager
def _on_gpu(device: torch.device) -> Iterator[None]:
    """What is otherwise than Inductor's on NVIDIA GPUs."""
    if device.type != "cuda" or torch.version.hip:
        yield
        return
    from qcompile.lowering.inductor_choices import whole_rows
    from qcompile.lowering.kernel_accesses import remembered

    with whole_rows(), remembered():
        yield


def _no_autocast() -> contextlib.AbstractContextManager[Any]:
    disabled: contextlib.AbstractContextManager[Any] = (
        torch._C._DisableAutocast() if torch._C._is_any_autocast_enabled() else contextlib.nullcontext()
    )
    return disabled


def compile_eager(gm: GraphModule) -> Boxed:
    """Run a lowered graph op by op, with the same calling convention."""

    def call(args: list[Any]) -> Any:
        inputs = list(args)
        args.clear()
        return gm(*inputs)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def has_compiler() -> bool:
    """Whether Inductor finds a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return bool(get_cpp_compiler())
    except Exception:  # Inductor's own error type differs between versions
        return False


def choose_inner(wanted: str) -> str:
    """ "inductor" or "eager"; of "auto", which the command line and generation offer, the first that runs here."""
    if wanted != "auto":
        return wanted
    return "inductor" if has_compiler() else "eager"
