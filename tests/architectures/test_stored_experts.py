"""Mixtures of experts are stored and come back bit for bit: a few here, all of them in `make coverage-archs`."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny
from huggingface_hub.errors import StrictDataclassError
from torch import nn

import qcompile
from qcompile.quantized_experts import quantized_experts, why_not_quantized

pytestmark = pytest.mark.filterwarnings("ignore")  # of third parties, about models' code
EVERYTHING = bool(os.environ.get("QCOMPILE_EVERY_MIXTURE"))
# Of Qwen2-MoE's names, and patterns that are regular expressions; of Mixtral's in tests/checkpoint.
NAMES = tiny.causal_names() if EVERYTHING else ["deepseek_v3", "kimi_linear"]
# A linear of their convolutions is renamed in a way that leaves its scale behind.
UNREADABLE = ("inkling2_text",)


@pytest.mark.parametrize("name", NAMES)
def test_they_come_back(name: str, tmp_path: Path) -> None:
    try:
        model: Any = tiny.build(name, torch.float32)
    except (ImportError, ValueError, StrictDataclassError) as error:
        pytest.skip(f"not built: {error}")
    if not any(is_mixture(module) for module in model.modules()) or name in UNREADABLE:
        pytest.skip("no experts that could be stored")
    arguments = tiny.example(name, model, torch.float32)
    qcompile.quantize(model, [arguments])
    kept = [reason for name, reason in model.qcompile_record.kept.items() if "experts." in name]
    assert bool(quantized_experts(model)) != any("hold it as one tensor" in reason for reason in kept)
    again = qcompile.from_pretrained(qcompile.save_pretrained(model, tmp_path / "out"))
    assert {n: e.quantized_stacks() for n, e in quantized_experts(again).items()} == {
        n: e.quantized_stacks() for n, e in quantized_experts(model).items()
    }
    with torch.no_grad():
        assert torch.equal(again(**arguments).logits, model(**arguments).logits)


def is_mixture(module: nn.Module) -> bool:
    return hasattr(module, "has_gate") and not why_not_quantized(module)
