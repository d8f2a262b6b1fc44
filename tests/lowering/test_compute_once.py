"""Cosines and sines that several kernels read are kept; everything else stays, and so do the numbers."""

import re
from typing import Any

import pytest
import torch
from graphs import captured
from torch import Tensor, nn
from torch.fx import GraphModule

from qcompile.lowering.compute_once import compute_once
from qcompile.rewrite import copy_graph

aten = torch.ops.aten
pretending = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU; tests/gpu uses it")


class Rotate(nn.Module):
    """Layers that turn their input by angles of its positions, as rotary embeddings do."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        angle = position[:, None].float() * torch.arange(x.shape[-1], device=x.device)
        cos, sin = (f(angle).mul(1.5).to(x.dtype)[None] for f in (torch.cos, torch.sin))
        for _ in range(self.layers):
            x = torch.softmax(x * cos + x.flip(-1) * sin, -1)
        return x


INPUTS = torch.randn(2, 8, 64), torch.arange(8)


def kept(gm: GraphModule) -> list[Any]:
    return list(gm.graph.find_nodes(op="call_function", target=aten.as_strided.default))


def test_what_layers_share_is_kept_where_they_read_it() -> None:
    one = captured(Rotate(3), *INPUTS)
    gm = compute_once(copy_graph(one.graph))
    gm.graph.lint()
    found = kept(gm)
    assert len(found) == 2
    for node in found:
        (copy,) = node.all_input_nodes
        (source,) = copy.all_input_nodes
        assert list(source.users) == [copy]
        assert len(node.users) == 3
        assert node.meta["val"].shape == (1, 8, 64), "behind the scaling, the cast and the new dimension"
    assert torch.equal(gm(*one.args)[0], one.graph(*one.args)[0])
    again = str(gm.code)
    assert str(compute_once(gm).code) == again, "a second time changes nothing"


def test_what_has_one_reader_stays() -> None:
    one = captured(Rotate(1), *INPUTS)
    assert kept(compute_once(copy_graph(one.graph))) == []


class Cut(nn.Module):
    """A table of cosines of which each kernel reads the same part, not from its beginning, or in another order."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        table = torch.cos(angle)
        if self.kind == "rows":
            part = table[:, 2:6]
        elif self.kind == "columns":
            part = table[..., 16:32]
        elif self.kind == "steps":
            part = table[..., ::2]
        elif self.kind == "turned":
            part = table.transpose(1, 2)
        else:
            part = table[:1].expand(3, -1, -1)
        for _ in range(3):
            x = torch.softmax(x * part.sum((1, 2), keepdim=True) + part.amax(), -1) @ torch.ones(x.shape[-1], 9)
        return x * part.mean((1, 2), keepdim=True)


@pytest.mark.inductor
@pytest.mark.parametrize("kind", ["rows", "columns", "steps", "turned", "expanded"])
@pytest.mark.parametrize("batch", [1, 2])
def test_parts_of_a_table_are_read_where_they_are(kind: str, batch: int) -> None:
    """Inductor computes a slice densely, whatever strides it has on paper."""
    from qcompile.lowering.inductor import compile_inductor, decompositions
    from qcompile.lowering.lower import lower
    from qcompile.lowering.target import Target

    one = captured(Cut(kind), torch.randn(3, 5, 9), torch.randn(3 if batch == 2 else 1, 8, 32))
    expected = one.graph(*one.args)[0]
    gm = compute_once(lower(one.graph, Target("cpu"), decompositions())[0])
    with torch.no_grad():
        (actual,) = compile_inductor(gm, [], None)(list(one.args))
    torch.testing.assert_close(actual, expected)


def mask_of(made: bool) -> GraphModule:
    """Two layers that attend under one mask, computed or given, as they are lowered for a GPU."""
    pytest.importorskip("triton")
    from graphs import apply

    from qcompile.lowering.inductor import decompositions
    from qcompile.lowering.lower import lower
    from qcompile.lowering.target import Target
    from qcompile.passes.simplify_attention import SimplifyAttention

    class Twice(nn.Module):
        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            mask = ((seen > 0)[None] & (seen < 5)[:, None])[None, None, 1:2] if made else seen[None, None, None]
            for _ in range(2):
                key = x.expand(-1, -1, 8, -1)
                x = nn.functional.scaled_dot_product_attention(x, key, key, mask)
            return x

    seen = torch.arange(8) if made else torch.arange(8) > 2
    gm, _ = apply(captured(Twice(), torch.randn(1, 2, 1, 16), seen), SimplifyAttention())
    return lower(gm, Target("cuda", 90), decompositions())[0]


@pytest.mark.parametrize("made", [False, True])
def test_a_mask_that_is_computed_is_kept(made: bool) -> None:
    gm = compute_once(mask_of(made))
    assert len(kept(gm)) == made
    calls = [node for node in gm.graph.nodes if "qcompile_triton.attention" in str(node.target)]
    assert len(calls) == 2
    assert calls[0].args[3] is calls[1].args[3]


def test_a_result_is_kept_as_it_is() -> None:
    class Angles(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.cos(x)
            return y, y + 1

    one = captured(Angles(), torch.randn(3, 5).T)
    gm = compute_once(copy_graph(one.graph))
    assert [tuple(y.stride()) for y in gm(*one.args)] == [tuple(y.stride()) for y in one.graph(*one.args)]


def test_symbolic_sizes_stay() -> None:
    one = captured(Rotate(2), *INPUTS, dynamic=True)
    assert kept(compute_once(copy_graph(one.graph))) == []


@pretending
@pytest.mark.inductor
@pytest.mark.parametrize("once", [False, True])
def test_inductor_computes_them_once(once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pass, each of three layers has a cosine and a sine of its own."""
    pytest.importorskip("triton")
    from absent_gpu import inductor_source

    from qcompile import backend
    from qcompile.lowering.target import Target

    if not once:
        monkeypatch.setattr(backend, "compute_once", lambda gm: gm)
    source = inductor_source(captured(Rotate(3), *INPUTS).graph, Target("cuda", 90))
    kernels = re.split(r"^def triton_", source, flags=re.M)[1:]
    with_cosine = [text for text in kernels if "tl_math.cos(" in text.partition("\n''',")[0]]
    launches = sum(source.count(f"{'triton_' + text.partition('(')[0]}.run(") for text in with_cosine)
    assert launches == (1 if once else 3)
