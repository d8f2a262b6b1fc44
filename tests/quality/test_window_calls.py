"""Windows of tokens as calls: of decoder-only, encoder–decoder and masked models, and of what is no language model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IDS, TEXT, llama, tokenizer

from qcompile import cli
from qcompile.errors import ConfigError
from qcompile.quality.checkpoint import evaluate_checkpoint
from qcompile.quality.window_calls import check_callable, logits_of, window_call


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def test_a_decoder_reads_the_whole_window() -> None:
    call = window_call(llama(), IDS)
    assert set(call.arguments) == {"input_ids", "use_cache"}
    assert torch.equal(call.read, IDS)
    assert window_call(llama(), IDS, logits=False).arguments["logits_to_keep"] == 1


def test_an_encoder_decoder_reads_a_half_each() -> None:
    call = window_call(t5(), IDS)
    assert torch.equal(call.arguments["input_ids"], IDS[:, :8])
    assert torch.equal(call.arguments["decoder_input_ids"], IDS[:, 8:])
    assert torch.equal(call.read, IDS[:, 8:])


def test_an_encoder_decoder_is_scored_on_its_second_half() -> None:
    model = t5()
    found = evaluate_checkpoint(model, IDS, batch=2)
    with torch.no_grad():
        logits = model(input_ids=IDS[:, :8], decoder_input_ids=IDS[:, 8:]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 64), IDS[:, 9:].reshape(-1))
    assert found.tokens == 2 * 7
    assert found.nll == pytest.approx(float(expected), abs=1e-6)


def test_an_encoder_decoder_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "t5", tmp_path / "out"
    t5().save_pretrained(source)
    tokenizer().save_pretrained(source)
    (tmp_path / "text.txt").write_text(TEXT * 30)
    options = ["--calibration", str(tmp_path / "text.txt"), "--seqlen", "32", "--samples", "4", "--quality", "1"]
    status = cli.main(["quantize", str(source), "--out", str(out), *options])
    assert status == 0, capsys.readouterr().err
    text = ["--text", str(tmp_path / "text.txt"), "--seqlen", "32", "--windows", "2", "--inner", "eager"]
    assert cli.main(["evaluate", str(out), "--against", str(source), *text]) == 0
    printed = capsys.readouterr().out
    assert "EncDecAttention" in printed
    assert "over 30 tokens" in printed


def test_what_takes_no_tokens_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32)
    model = ViTForImageClassification(config).eval()
    with pytest.raises(ConfigError, match=r"ViTForImageClassification must be callable on tokens alone; it fails"):
        check_callable(model, IDS)
    model.save_pretrained(tmp_path / "vit")
    tokenizer().save_pretrained(tmp_path / "vit")
    (tmp_path / "text.txt").write_text(TEXT * 30)
    options = ["--calibration", str(tmp_path / "text.txt"), "--seqlen", "32", "--samples", "4"]
    assert cli.main(["quantize", str(tmp_path / "vit"), "--out", str(tmp_path / "out"), *options]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("qcompile: ViTForImageClassification must be callable on tokens alone")
    assert not (tmp_path / "out").exists()


def test_windows_have_something_to_predict() -> None:
    check_callable(t5(), IDS[:, :3])
    check_callable(llama(), IDS[:, :2])
    with pytest.raises(ConfigError, match="at least 3 tokens for T5For.*; got 2; give a longer --seqlen"):
        check_callable(t5(), IDS[:, :2])


def test_a_model_without_a_head_has_no_likelihood() -> None:
    model = llama().model
    with pytest.raises(ConfigError, match="LlamaModel gives none"):
        evaluate_checkpoint(model, IDS)
    with torch.no_grad():
        assert logits_of(llama(), llama()(input_ids=IDS)).shape == (2, 16, 64)
