"""The attention kernel on the GPU that is here: the checks of the interpreter, bfloat16 among them, and CUDA graphs."""

import pytest
import torch
from attention_checks import MASKS, Case, check
from compiling import compiled
from tolerances import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_mask_in_any_number_of_parts(dtype: torch.dtype) -> None:
    for mask in MASKS:
        for parts in (1, 2, 8):
            check(Case(mask=mask, parts=parts, dtype=dtype), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_sizes(dtype: torch.dtype) -> None:
    for keys in (1, 15, 16, 17, 127, 129, 4095):
        check(Case(keys=keys, parts=4, mask="bool", dtype=dtype), "cuda")
    for channels, value_channels in ((1, 0), (24, 0), (80, 0), (40, 24), (128, 0), (256, 0)):
        check(Case(channels=channels, value_channels=value_channels, mask="float", dtype=dtype), "cuda")
    for shares in (1, 4, 17, 71):
        check(Case(shares=shares, groups=1, keys=133, mask="heads", dtype=dtype), "cuda")


def test_the_real_thing() -> None:
    for batch in (1, 32):
        for mask in ("none", "bool"):
            check(Case(batch, 8, 4, 512, 128, mask=mask, dtype=torch.bfloat16, parts=4, scale=128**-0.5), "cuda")


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_decode_with_a_static_cache(mode: str | None) -> None:
    """Several steps, each of which must see the keys that the one before wrote."""
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=512)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False).cuda()
    ids = torch.randint(3, 512, (2, 20), device="cuda")
    expected, actual = [], []
    with torch.no_grad():
        for found, forward in (
            (expected, compiled(model)), (actual, compiled(model, inner="inductor", mode=mode)),
        ):  # fmt: skip
            cache = StaticCache(config=config, max_cache_len=64)
            model(input_ids=ids[:, :9], past_key_values=cache)
            for at in range(9, 20):
                position = torch.full((2, 1), at, device="cuda")
                y = forward(input_ids=ids[:, at : at + 1], past_key_values=cache, position_ids=position).logits
                found.append(y.clone())
    assert_close("int8/another device", actual=torch.cat(actual), expected=torch.cat(expected))
