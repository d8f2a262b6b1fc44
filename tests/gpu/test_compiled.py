"""Whole modules and models on the GPU, against the same lowered for the CPU."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import compiled
from graphs import Attention, GatedMLP, PostNorm
from tolerances import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

MODELS = Path(__file__).parents[3] / "shared" / "data" / "models"


def dtypes() -> list[str]:
    return ["int8", "fp8"] if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9) else ["int8"]


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("model", [GatedMLP, Attention, PostNorm])
def test_modules(model: type[Any], dtype: str) -> None:
    module = model(64).eval() if model is not PostNorm else PostNorm(64, 128).eval()
    x = torch.randn(2, 37, 64)
    with torch.no_grad():
        expected = compiled(module, dtype=dtype)(x)
        module = module.cuda()
        for inner in ("eager", "inductor"):
            actual = compiled(module, dtype=dtype, inner=inner)(x.cuda())
            assert_close(f"{dtype}/another device", actual=actual.cpu(), expected=expected)


def test_numbers_of_tokens_may_change() -> None:
    """Static, then symbolic: a symbolic one picks its tile at every call."""
    module = GatedMLP(64, 128).eval()
    reference, fast = compiled(copy.deepcopy(module)), compiled(module.cuda(), inner="inductor")
    with torch.no_grad():
        for tokens in (3, 40, 17, 300, 1, 0):
            x = torch.randn(1, tokens, 64)
            assert_close("int8/another device", actual=fast(x.cuda()).cpu(), expected=reference(x))


def test_cuda_graphs() -> None:
    module = GatedMLP(256, 512).eval().cuda().bfloat16()
    plain, graphed = compiled(module, inner="inductor"), compiled(module, inner="inductor", mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(5):
            torch.manual_seed(seed)
            x = torch.randn(1, 256, device="cuda", dtype=torch.bfloat16)
            assert torch.equal(graphed(x).clone(), plain(x))


def models() -> list[str]:
    found = sorted(path.name for path in MODELS.iterdir() if (path / "config.json").exists()) if MODELS.is_dir() else []
    return found or ["random"]


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("name", models())
def test_models(name: str, dtype: str) -> None:
    """The logits of a causal model in float32, GPU against CPU."""
    if name == "random":
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, vocab_size=512)
        )  # fmt: skip
    else:
        model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
    model = model.eval().requires_grad_(False)
    ids = torch.randint(3, model.config.vocab_size, (2, 48))
    with torch.no_grad():
        expected = compiled(model, dtype=dtype)(input_ids=ids, use_cache=False).logits
        actual = compiled(model.cuda(), dtype=dtype, inner="inductor")(input_ids=ids.cuda(), use_cache=False).logits
    assert_close(f"{dtype}/another device", actual=actual.cpu(), expected=expected)


def test_generate_with_a_static_cache() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=512, eos_token_id=None, pad_token_id=0)
    ).eval().requires_grad_(False).cuda()  # fmt: skip
    ids = torch.randint(3, 512, (1, 9), device="cuda")
    model.compile(backend="w8a8")
    with torch.no_grad():
        y = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert y.shape == (1, 17)


def test_the_clock_and_tune(tmp_path: Path) -> None:
    from qcompile import cli
    from qcompile.bench.gpu_timing import microseconds

    x = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    assert 1 < microseconds([lambda: x @ x]) < 10_000
    path = tmp_path / "tiles.json"
    assert cli.main(["tune", "--shape", "256,512", "--tokens", "1", "--out", str(path)]) == 0
    module = torch.nn.Sequential(torch.nn.LayerNorm(512), torch.nn.Linear(512, 256)).eval()
    with torch.no_grad():
        expected = compiled(module)(torch.ones(1, 512))
        actual = compiled(module.cuda(), tiles=str(path), inner="inductor")(torch.ones(1, 512, device="cuda"))
    assert_close("int8/another device", actual=actual.cpu(), expected=expected)
