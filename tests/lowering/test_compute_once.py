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
        (source,) = node.all_input_nodes
        assert list(source.users) == [node]
        assert len(node.users) == 3
        assert node.meta["val"].shape == (1, 8, 64), "behind the scaling, the cast and the new dimension"
    assert torch.equal(gm(*one.args)[0], one.graph(*one.args)[0])
    again = str(gm.code)
    assert str(compute_once(gm).code) == again, "a second time changes nothing"


def test_what_has_one_reader_stays() -> None:
    one = captured(Rotate(1), *INPUTS)
    assert kept(compute_once(copy_graph(one.graph))) == []


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
