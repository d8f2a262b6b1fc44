"""Open Triton operators up for Inductor: the operator's call becomes the kernel's launch.

    y = qcompile_triton.scaled_mm(x, w, …, tiles)   →   y = triton_kernel_wrapper_functional(kernel, grid, …)["out"]

As AOTAutograd does for `torch.library.triton_op`s in user code. Inductor then launches the kernel itself, plans its
output's memory, and fuses split-K's sum and epilogue, or the sum of attention's parts, into what follows. Calls with
operands of symbolic sizes stay operators, which choose the tile at each call.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from qcompile.lowering.inductor import Boxed
from qcompile.lowering.kernel_accesses import remembered
from qcompile.lowering.tiles import pick
from qcompile.rewrite import args_of, fake_mode_of

NAMESPACE = "qcompile_triton"


def expand_kernels(gm: GraphModule, decompositions: dict[Any, Callable[..., Any]]) -> GraphModule:
    """The same graph with every call of known size opened up; gm itself if there is none. meta["tma"] says whether
    a launch uses TMA, for `with_workspace`."""
    calls = {node for node in gm.graph.nodes if _is_kernel(node)}
    if not calls:
        return gm
    from torch._subclasses.functional_tensor import dispatch_functionalize

    class _Expanding(Interpreter):
        def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if getattr(target, "namespace", "") == NAMESPACE and _is_known(args):
                return dispatch_functionalize(target)(*args, **kwargs)
            return super().call_function(target, args, kwargs)

    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    with fake_mode_of(gm), preserve_node_meta(), remembered():
        trace = make_fx(_Expanding(gm).run, decomposition_table=decompositions, _allow_non_fake_inputs=True)
        expanded = trace(*(node.meta["val"] for node in placeholders))
    expanded.meta["tma"] = any(_uses_tma(node) for node in calls)
    for old, new in zip(placeholders, expanded.graph.find_nodes(op="placeholder"), strict=True):
        new.meta.update(old.meta)
    return expanded


def with_workspace(run: Boxed) -> Boxed:
    """A compiled graph whose launches use TMA, to be called from any thread."""
    from qcompile.lowering.scaled_mm_kernel import set_workspace

    def call(args: list[Any]) -> Any:
        set_workspace()
        return run(args)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def _uses_tma(call: Node) -> bool:
    """Whether a product's tile has it; attention reads through pointers."""
    if "scaled_mm" not in str(call.target):
        return False
    x, tiles = args_of(call)[0], args_of(call)[8]
    m = x.meta["val"].shape[0]
    return isinstance(m, int) and pick(tiles, m).tma


def _is_known(args: tuple[Any, ...]) -> bool:
    """Whether no operand has a symbolic size."""
    sizes = [size for x in args if isinstance(x, Tensor) for size in (*x.shape, *x.stride())]
    return all(isinstance(size, int) for size in sizes)


def _is_kernel(node: Node) -> bool:
    return getattr(node.target, "namespace", "") == NAMESPACE
