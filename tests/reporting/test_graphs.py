"""Passes and graphs as data."""

import torch
from graphs import GatedMLP, captured
from hypothesis import given
from hypothesis import strategies as st

from qcompile import passes
from qcompile.config import Config
from qcompile.dump import graph_text
from qcompile.reporting.graphs import Lines, Steps, changed_blocks, run_data, source_of


def ran() -> tuple[Steps, torch.fx.GraphModule]:
    steps = Steps()
    final, _ = passes.quantizing(Config(calibrate=1)).run(captured(GatedMLP(), torch.randn(2, 16)).graph, [steps])
    return steps, final


def test_texts_are_the_dumps_line_by_line() -> None:
    steps, final = ran()
    lines = Lines()
    data = run_data(steps, final, {}, lines)
    graphs = steps.graphs(final)
    assert len(data["texts"]) == len(data["passes"]) + 1 == len(graphs)
    for gm, text in zip(graphs, data["texts"], strict=True):
        assert "\n".join(lines.lines[i][0] for i in text) + "\n" == graph_text(gm)


def test_a_line_of_many_graphs_is_kept_once() -> None:
    steps, final = ran()
    lines = Lines()
    data = run_data(steps, final, {}, lines)
    assert len(set(lines.lines)) == len(lines.lines) < sum(map(len, data["texts"])) / 3
    assert len(set(lines.sources)) == len(lines.sources)


def test_blocks_turn_one_graph_into_the_next() -> None:
    steps, final = ran()
    lines = Lines()
    data = run_data(steps, final, {}, lines)

    def names(text: list[int]) -> list[str]:
        return [lines.lines[i][0].partition(":")[0].partition(" ")[0] for i in text]

    for step, before, after in zip(data["passes"], data["texts"], data["texts"][1:], strict=False):
        left, right = names(before), names(after)
        for a, b, c, d in reversed(step["blocks"]):
            left[a:b] = right[c:d]
        assert left == right, step["name"]


def test_passes_say_what_they_did() -> None:
    steps, final = ran()
    data = run_data(steps, final, {"smooth": {"error": 1e-7, "limit": 2e-5}}, Lines())
    found = {step["name"]: step for step in data["passes"]}
    assert list(found) == [taken.step.name for taken in steps.taken]
    assert found["quantize_linears"]["edits"] > 0
    assert found["quantize_linears"]["bound"] == "quantization"
    assert found["smooth"]["check"] == {"error": 1e-7, "limit": 2e-5}
    assert found["canonicalize"]["check"] is None
    assert all(step["seconds"] > 0 and step["doc"] for step in data["passes"])


def test_refusals_are_shown() -> None:
    steps = Steps()
    graph = captured(GatedMLP(), torch.randn(2, 16)).graph
    final, _ = passes.quantizing(Config(calibrate=1, ignore=("up_proj",))).run(graph, [steps])
    (finding,) = [step for step in run_data(steps, final, {}, Lines())["passes"] if step["name"] == "find_linears"]
    assert finding["refused"] == 1
    assert finding["refusals"][0][1] == "up_proj: its name matches an ignore pattern"


def test_sources_are_the_models_own_lines_without_folders() -> None:
    _, final = ran()
    silu = next(node for node in final.graph.nodes if node.target is torch.ops.aten.silu.default)
    assert source_of(silu).startswith("graphs.py:")
    assert "self.down_proj(nn.functional.silu(" in source_of(silu)
    silu.meta["stack_trace"] = 'File "/a/lib/site-packages/transformers/x.py", line 3, in forward\n    y = 1\n    ^'
    assert source_of(silu) == "transformers/x.py:3: y = 1"
    silu.meta["stack_trace"] = None
    assert source_of(silu) == ""


def test_blocks_of_names() -> None:
    assert changed_blocks("abcd", "abcd") == []
    assert changed_blocks("abcd", "axcde") == [(1, 2, 1, 2), (4, 4, 4, 5)]
    assert changed_blocks("abcd", "dabc") == [(0, 0, 0, 1), (3, 4, 4, 4)], "what moved is taken out and put in"
    assert changed_blocks("", "ab") == [(0, 0, 0, 2)]
    assert changed_blocks("ab", "") == [(0, 2, 0, 0)]


@given(st.lists(st.integers(0, 40), unique=True), st.lists(st.integers(0, 40), unique=True))
def test_blocks_keep_as_much_as_can_be_kept(before: list[int], after: list[int]) -> None:
    left, right = [list(map(str, names)) for names in (before, after)]
    blocks = changed_blocks(left, right)
    made = list(left)
    for a, b, c, d in reversed(blocks):
        made[a:b] = right[c:d]
    assert made == right
    lengths = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, x in enumerate(left):
        for j, y in enumerate(right):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if x == y else max(lengths[i][j + 1], lengths[i + 1][j])
    assert len(left) - sum(b - a for a, b, _, _ in blocks) == lengths[-1][-1]
