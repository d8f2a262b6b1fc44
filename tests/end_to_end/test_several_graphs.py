"""Models of transformers that Dynamo breaks into many graphs: quantized in place, saved, loaded, explained."""

from pathlib import Path
from typing import Any

import torch
from architectures import tiny
from tolerances import assert_close
from torch import Tensor, nn

import qcompile
from qcompile.quantized_linear import quantized_linears


def built(name: str, dtype: torch.dtype, outliers: float) -> tuple[Any, dict[str, Any]]:
    """A tiny model, some channels of whose norms are so many times the others, and a call."""
    torch.manual_seed(0)
    model = tiny.build(name, dtype)
    for key, parameter in model.named_parameters():
        if "norm" in key and key.endswith("weight") and parameter.ndim == 1:
            parameter.data[::5] *= outliers
    return model, {"input_ids": tiny.example(name, model, dtype)["input_ids"], "use_cache": False}


def logits(model: nn.Module, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**call).logits
    return found


def test_smoothing_changes_nothing() -> None:
    """Experts in a loop over what data picks, each in graphs of their own."""
    model, call = built("longcat_flash", torch.float64, 10.0)
    before, expected = {k: p.clone() for k, p in model.named_parameters()}, logits(model, call)
    qcompile.smooth(model, qcompile.calibrate(model, [call]))
    changed = [k for k, p in model.named_parameters() if not torch.equal(p, before[k])]
    assert len(changed) == 44
    assert {key.split(".")[2] for key in changed if "norm" in key} == {"0", "1"}
    assert_close("smooth/float64", actual=logits(model, call), expected=expected)


def test_quantized_saved_and_loaded(tmp_path: Path) -> None:
    """Two layers, which share what Dynamo compiled for the first."""
    model, call = built("dbrx", torch.float32, 1.0)
    expected = logits(model, call)
    explained = qcompile.explain(model, call)
    assert explained.graphs > 5
    rows = [row.name for row in explained.rows if row.kernel]
    qcompile.quantize(model, [call])
    assert len(quantized_linears(model)) == 4
    assert sorted(quantized_linears(model)) == sorted(set(rows) - set(model.qcompile_record.kept))
    assert {name.split(".")[2] for name in quantized_linears(model)} == {"0", "1"}
    found = logits(model, call)
    assert_close("int8/model", actual=found, expected=expected)
    qcompile.save_pretrained(model, tmp_path / "folder")
    loaded = qcompile.from_pretrained(tmp_path / "folder").eval()
    assert quantized_linears(loaded).keys() == quantized_linears(model).keys()
    assert torch.equal(logits(loaded, call), found)
