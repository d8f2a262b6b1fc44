"""The report's table of linears: what explain says, what was measured, and where each is in the graph."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from qcompile.explanation import STORED, Row, stored_name
from qcompile.passes.find_linears import info_of, linears
from qcompile.reporting.channels import Channels
from qcompile.reporting.graphs import Steps

Link = tuple[int, int, int]


def linear_data(
    rows: Sequence[Row],
    links: Mapping[str, Link],
    channels: Mapping[str, Channels],
    sqnr: Mapping[str, float],
    alpha: float | str | None,
) -> list[dict[str, Any]]:
    """One entry per row; links: graph, pass and line of the linear. alpha: what was asked for, which a linear has if
    its channels are not known and it is a number."""
    asked = [alpha] if isinstance(alpha, float | int) else []
    whole = sum(row.macs for row in rows) or 1
    return [
        {
            "name": row.name, "shape": (row.outputs, row.inputs), "share": row.macs / whole, "calls": row.calls,
            "fate": fate(row), "kernel": row.kernel, "why": why(row), "link": links.get(row.name),
            "sqnr": sqnr.get(row.name) if row.kernel else None,
            **_numbers(channels.get(row.name), asked if row.folded or row.absorbed else []),
        }
        for row in rows
    ]  # fmt: skip


def fate(row: Row) -> str:
    """What becomes of a linear, in two words at most."""
    if not row.kernel:
        return "float"
    if row.stored:
        return "stored"
    if row.folded:
        return "folded" if row.folded == 1 else "folded in part"
    return "run time" if row.absorbed else "not smoothed"


def why(row: Row) -> str:
    """The reason for it."""
    if row.stored:
        return "quantized before it was loaded"
    return row.reason if not row.kernel else "; ".join(filter(None, (row.smoothing, row.note)))


def _numbers(found: Channels | None, asked: list[float]) -> dict[str, Any]:
    if found is None:
        return {"alphas": asked, "factor": None, "scale": None}
    return {"alphas": list(found.alphas), "factor": found.factor, "scale": found.weight_scale}


def links_of(graph: int, steps: Steps) -> dict[str, Link]:
    """Where the linears of a graph are: in the pass that quantizes them, or, if they stay in float, that finds them."""
    found: dict[str, Link] = {}
    positions = {taken.step.name: index for index, taken in enumerate(steps.taken)}
    quantizing = positions["quantize_linears"]
    before = steps.before(quantizing)
    lines = {node: line for line, node in enumerate(before.graph.nodes)}
    for node in linears(before):
        info = info_of(node)
        if info.quantize:
            found.setdefault(info.name, (graph, quantizing, lines[node]))
    finding = positions["find_linears"]
    names = {node.name: line for line, node in enumerate(steps.before(finding).graph.nodes)}
    for node in linears(before):
        info = info_of(node)
        if not info.quantize and node.name in names:
            found.setdefault(info.name, (graph, finding, names[node.name]))
    return found


def stored_links(gm: GraphModule, graph: int) -> dict[str, Link]:
    """Where linears that were quantized before the model was loaded are in the graph of the first pass."""
    links: dict[str, Link] = {}
    for line, node in enumerate(gm.graph.nodes):
        if node.target in STORED:
            links.setdefault(stored_name(node), (graph, 0, line))
    return links
