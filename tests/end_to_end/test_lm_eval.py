"""The field's own evaluator, lm-evaluation-harness, runs on a loaded quantized model, with a task made of a local
file."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from checkpoints import TEXT, logits, quantized, tokenizer

import qcompile

pytest.importorskip("lm_eval", reason="needs the extra qcompile[eval]")
pytest.importorskip("accelerate", reason="needs the extra qcompile[eval]")


def task(folder: Path) -> dict[str, Any]:
    (folder / "pages.jsonl").write_text("\n".join(json.dumps({"page": TEXT[:60]}) for _ in range(2)))
    return {
        "task": "local_pages",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "pages.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
def test_byte_perplexity_is_ours(tmp_path: Path, compiled: bool) -> None:
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM

    qcompile.save_pretrained(quantized(), tmp_path / "m", tokenizer=tokenizer())
    model = qcompile.from_pretrained(tmp_path / "m")
    ids = torch.tensor([[1, *tokenizer()(TEXT[:60])["input_ids"]]])
    likelihood = float(logits(model, ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum())
    if compiled:
        model.compile(backend="w8a8", options={"inner": "eager"})
    harness = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=1, max_length=100, prefix_token_id=1)
    found = lm_eval.simple_evaluate(model=harness, tasks=[task(tmp_path)], bootstrap_iters=0)
    perplexity = found["results"]["local_pages"]["byte_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-likelihood / 60), rel=1e-4)
