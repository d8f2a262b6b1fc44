"""A graph as JSON and back: what passes and Inductor look at is there again."""

import json
from typing import Any

import pytest
import torch
from graphs import GatedMLP, captured
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

from qcompile.errors import GraphError
from qcompile.saved_graph.nodes import describe, restore
from qcompile.saved_graph.values import LOWERED


class Views(nn.Module):
    """A split, of which one half is read in another layout."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return left @ right.mT


def again(gm: GraphModule, **options: Any) -> GraphModule:
    described, constants = describe(gm)
    return restore(json.loads(json.dumps(described)), constants, **options)


def memories(gm: GraphModule) -> list[int]:
    """For each tensor, the first in the same memory."""
    values = [node.meta["val"] for node in gm.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    addresses = [value.untyped_storage()._cdata for value in values]
    return [addresses.index(address) for address in addresses]


def test_the_code_and_the_facts_are_the_same() -> None:
    gm = captured(GatedMLP(), torch.randn(2, 5, 16)).graph
    found = again(gm)
    assert found.code == gm.code
    assert found.meta["whole_model"] is True
    assert [node.name for node in found.graph.nodes] == [node.name for node in gm.graph.nodes]


def test_values_share_memory_as_they_did() -> None:
    """Inductor plans writes in place by it."""
    gm = captured(Views(), torch.randn(3, 4, 16)).graph
    found = again(gm)
    assert len(set(memories(gm))) < len(memories(gm))
    assert memories(found) == memories(gm)
    for old, new in zip(gm.graph.nodes, found.graph.nodes, strict=True):
        left, right = old.meta.get("val"), new.meta.get("val")
        if isinstance(left, Tensor):
            assert (left.shape, left.stride(), left.dtype) == (right.shape, right.stride(), right.dtype)


def test_values_belong_to_the_mode_that_was_given() -> None:
    mode = FakeTensorMode()
    found = again(captured(GatedMLP(), torch.randn(2, 5, 16)).graph, fake_mode=mode)
    values = [node.meta["val"] for node in found.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert values
    assert all(value.fake_mode is mode for value in values)


def test_symbols_are_described_only_where_a_value_has_one() -> None:
    assert describe(captured(GatedMLP(), torch.randn(2, 5, 16)).graph)[0]["symbols"] == []
    assert describe(captured(GatedMLP(), torch.randn(2, 5, 16), dynamic=True).graph)[0]["symbols"] != []


def test_namespaces_are_those_asked_for() -> None:
    """Graphs that users exchange call no kernels; ours may."""
    import qcompile.lowering.scaled_mm_vnni  # noqa: F401 — registers the operator

    gm = captured(GatedMLP(), torch.randn(2, 5, 16)).graph
    node = next(node for node in gm.graph.nodes if node.op == "call_function")
    node.target = torch.ops.qcompile_cpu.scaled_mm.default
    with pytest.raises(GraphError, match="may call operators of"):
        describe(gm)
    described, constants = describe(gm, LOWERED)
    with pytest.raises(GraphError, match="may call operators of"):
        restore(described, constants)
    found = restore(described, constants, namespaces=LOWERED)
    assert found.graph.find_nodes(op="call_function", target=node.target)
