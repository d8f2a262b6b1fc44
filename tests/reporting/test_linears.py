"""The table of linears."""

import torch
from graphs import GatedMLP, captured
from reports import quantized_report, report_of

from qcompile import passes
from qcompile.config import Config
from qcompile.explanation import Row
from qcompile.reporting.channels import Channels
from qcompile.reporting.graphs import Steps
from qcompile.reporting.linears import fate, linear_data, links_of, why

ROW = Row("fc", 4, 8, 32, 1, 0, kernel="vnni")


def test_fates() -> None:
    def of(**changes: object) -> tuple[str, str]:
        import dataclasses

        row = dataclasses.replace(ROW, **changes)  # type: ignore[arg-type]
        return fate(row), why(row)

    assert of(folded=1.0, into=("norm.weight",)) == ("folded", "folded into norm.weight")
    assert of(folded=0.5, into=("a",))[0] == "folded in part"
    assert of(absorbed=1.0, unfolded="gelu") == ("run time", "at run time (not folded: gelu)")
    assert of() == ("not smoothed", "not smoothed")
    assert of(kernel="", reason="ignored") == ("float", "ignored")
    assert of(note="triton: no GPU") == ("not smoothed", "not smoothed; triton: no GPU")


def test_numbers_stand_where_they_are_known() -> None:
    ones = torch.ones(8)
    channels = {"fc": Channels(ones * 6, ones * 2, ones, ones * 3, 0.25, (0.5, None))}
    (entry,) = linear_data([ROW], {"fc": (0, 3, 17)}, channels, {"fc": 41.5}, "auto")
    assert entry["alphas"] == [0.5, None]
    assert (entry["factor"], entry["scale"], entry["sqnr"], entry["share"]) == (3.0, 0.25, 41.5, 1.0)
    assert entry["link"] == (0, 3, 17)
    (bare,) = linear_data([ROW], {}, {}, {}, 0.5)
    assert (bare["alphas"], bare["factor"], bare["sqnr"], bare["link"]) == ([], None, None, None)


def test_links_lead_to_the_linears_own_line() -> None:
    steps = Steps()
    graph = captured(GatedMLP(), torch.randn(2, 16)).graph
    final, _ = passes.quantizing(Config(calibrate=1, ignore=("up_proj",))).run(graph, [steps])
    links = links_of(0, steps)
    assert set(links) == {"gate_proj", "up_proj", "down_proj"}
    for name, (number, index, line) in links.items():
        taken = steps.taken[index]
        node = list(steps.before(index).graph.nodes)[line]
        assert number == 0
        assert node.target is torch.ops.aten.linear.default
        assert taken.step.name == ("find_linears" if name == "up_proj" else "quantize_linears")
    assert len(list(final.graph.nodes)) > 0


def test_every_linear_of_a_model_has_all_its_numbers() -> None:
    data = report_of().data
    quantized = [entry for entry in data["linears"] if entry["kernel"]]
    assert len(quantized) == 7
    for entry in quantized:
        assert entry["fate"] == "folded"
        assert entry["alphas"] == [0.5]
        assert entry["factor"] > 1
        assert 20 < entry["sqnr"] < 70
        graph, index, line = entry["link"]
        text = data["lines"][data["graphs"][graph]["texts"][index][line]][0]
        assert "aten.linear" in text
        assert entry["name"] in text
    (head,) = [entry for entry in data["linears"] if not entry["kernel"]]
    assert (head["name"], head["fate"], head["sqnr"]) == ("lm_head", "float", None)


def test_linears_that_were_quantized_before_are_listed() -> None:
    data = quantized_report().data
    stored = [entry for entry in data["linears"] if entry["fate"] == "stored"]
    assert len(stored) == 7
    assert all(entry["sqnr"] > 20 and entry["link"] and entry["kernel"] for entry in stored)
    graph, index, line = stored[0]["link"]
    assert "qcompile.scaled_mm" in data["lines"][data["graphs"][graph]["texts"][index][line]][0]
