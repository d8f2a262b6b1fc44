"""One program to a row on NVIDIA GPUs: the code that Inductor writes for one that is not here, and when it may."""

import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from qcompile import ops
from qcompile.lowering import inductor_choices
from qcompile.lowering.inductor import compile_inductor, decompositions
from qcompile.lowering.inductor_choices import LONGEST_ROW, WholeRows, whole_rows
from qcompile.lowering.target import Target

pytest.importorskip("triton")

import compile_only
import triton
from absent_gpu import inductor_source, pretended
from torch._inductor.choices import InductorChoices
from torch._inductor.virtualized import V
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pretending = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU; tests/gpu uses it")
H200 = Target("cuda", 90)
quantize: Callable[..., Any] = ops.REFERENCES[ops.quantize]


def traced(function: Callable[..., Any], *shapes: tuple[int, ...]) -> GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch._subclasses.FakeTensorMode():
        examples = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        return make_fx(function, decomposition_table=decompositions())(*examples)


def norm(x: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
    wide = x.float()
    y = gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return tuple(quantize(y, [], "row", torch.int8))


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return tuple(quantize(torch.nn.functional.layer_norm(x, gain.shape, gain, bias), [], "row", torch.int8))


def gated(x: Tensor) -> tuple[Tensor, ...]:
    half = x.shape[-1] // 2
    y = torch.nn.functional.silu(x.narrow(1, 0, half)) * x.narrow(1, half, half)
    return tuple(quantize(y, [], "row", torch.int8))


def generated(function: Callable[..., Any], *shapes: tuple[int, ...]) -> tuple[list[str], str]:
    """The kinds of the kernels that are launched, and all of the source."""
    source = inductor_source(traced(function, *shapes), H200)
    return re.findall(r"triton_(\w{3})_fused\w*\.run\(", source[source.index("def call(") :]), source


@pretending
@pytest.mark.inductor
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 4096), (1, LONGEST_ROW), (32, 14336), (2048, 4096), (2048, 5120), (16384, 4096)]
)
def test_norm_and_quantize_read_their_row_once(rows: int, width: int) -> None:
    kinds, source = generated(norm, (rows, width), (width,))
    assert kinds == ["per"]
    assert source.count("tl.load(") == 2, "x and the gain"


@pretending
@pytest.mark.inductor
@pytest.mark.parametrize("rows", [1, 32, 2048, 16384])
def test_a_wide_gate_is_not_shared_among_kernels(rows: int) -> None:
    kinds, source = generated(gated, (rows, 2 * 14336))
    assert kinds == ["per"]
    assert source.count("tl.load(") == 2, "gate and up"


@pretending
@pytest.mark.inductor
@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (norm, [(2048, LONGEST_ROW + 1), (LONGEST_ROW + 1,)]),
        (lambda x: (x.argmax(-1),), [(2048, 4096)]),
        (lambda x: (x.amax(0),), [(4096, 2048)]),
        (lambda x: (x.t().float().pow(2).sum(-1),), [(4096, 16384)]),
    ],
    ids=["longer", "argmax", "columns", "strided rows"],
)
def test_others_stay_as_inductor_makes_them(
    function: Callable[..., Any], shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds, source = generated(function, *shapes)
    assert "red" in kinds
    monkeypatch.setattr(inductor_choices, "WholeRows", InductorChoices)
    stock = generated(function, *shapes)[1]
    assert re.findall("tl.load.*", source) == re.findall("tl.load.*", stock)


@pretending
@pytest.mark.inductor
@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (layer_norm, [(2048, LONGEST_ROW), (LONGEST_ROW,), (LONGEST_ROW,)]),
        (gated, [(2048, 2 * LONGEST_ROW)]),
    ],
    ids=["layer norm", "gate"],
)
def test_the_longest_row_fits_into_registers(
    function: Callable[..., Any], shapes: list[tuple[int, ...]], tmp_path: Path
) -> None:
    """As Inductor launches it: there is one configuration, and none is tried out."""
    (text,) = re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", generated(function, *shapes)[1], re.DOTALL)
    file = tmp_path / "kernel.py"
    file.write_text(text.replace("triton_helpers.set_driver_to_gpu()", ""))
    with pretended(H200):
        names = runpy.run_path(str(file))
    (kernel,) = (value for name, value in names.items() if name.startswith("triton_per"))
    (choice,) = kernel.configs
    assert choice.kwargs == {"XBLOCK": 1}
    assert stack_of(kernel, choice) == 0


def stack_of(kernel: Any, choice: Any) -> int:
    """Bytes per thread of spilled registers, on sm90."""
    names, meta = kernel.fn.arg_names, kernel.triton_meta
    signature = {name: "constexpr" if name in choice.kwargs else meta["signature"][name] for name in names}
    constants = {(names.index(name),): value for name, value in choice.kwargs.items()}
    source = ASTSource(kernel.fn, signature, constants, meta["configs"][0])
    options = {"num_warps": choice.num_warps, "num_stages": choice.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return compile_only._stack(built.asm["cubin"])


@pretending
@pytest.mark.inductor
def test_switching_persistent_reductions_off_is_heeded() -> None:
    from torch._inductor import config

    with config.patch({"triton.persistent_reductions": False}):
        assert generated(norm, (2048, 4096), (4096,))[0] == ["red"]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[type]]:
    """The classes of the choices with which graphs are compiled."""
    import torch._inductor.compile_fx as compile_fx

    found: list[type] = []
    compiling = compile_fx.compile_fx_inner

    def recorded(*args: Any, **kwargs: Any) -> Any:
        found.append(type(V.choices))
        return compiling(*args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", recorded)
    yield found
    assert type(V.choices) is InductorChoices


@pytest.mark.inductor
def test_cpus_keep_inductors_choices(seen: list[type]) -> None:
    graph = traced(norm, (4, 4096), (4096,))
    x, gain = torch.randn(4, 4096).bfloat16(), torch.ones(4096, dtype=torch.bfloat16)
    with torch.no_grad():
        compile_inductor(graph, [], None)([x, gain])
    assert seen == [InductorChoices]


@pretending
@pytest.mark.inductor
def test_they_are_gone_after_compiling(seen: list[type]) -> None:
    """Here by an error: nothing is launched on a GPU that is not there."""
    generated(norm, (32, 4096), (4096,))
    assert seen == [WholeRows]


def test_they_are_gone_after_an_error() -> None:
    tag = torch.compiler.config.cache_key_tag

    def fails() -> None:
        with whole_rows():
            assert type(V.choices) is WholeRows
            raise ValueError("anything")

    with pytest.raises(ValueError, match="anything"):
        fails()
    assert type(V.choices) is InductorChoices
    assert torch.compiler.config.cache_key_tag == tag


def test_choices_of_others_stay() -> None:
    class Others(InductorChoices):
        pass

    tag = torch.compiler.config.cache_key_tag
    with V.set_choices_handler(Others()), whole_rows():
        assert type(V.choices) is Others
        assert torch.compiler.config.cache_key_tag == tag


@pytest.mark.inductor
def test_compiled_graphs_are_cached_apart() -> None:
    from torch._inductor.codecache import compiled_fx_graph_hash

    graph = traced(norm, (4, 4096), (4096,))
    fakes = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]

    def key() -> str:
        return compiled_fx_graph_hash(graph, fakes, {}, [])[0]

    with whole_rows():
        ours = key()
    assert key() == key() != ours
    with whole_rows():
        assert key() == ours
