"""A vision-language model: quantized with images and without, saved, loaded, generating."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import qcompile
from qcompile.quantized_linear import quantized_linears

IMAGE, PATCHES, VOCABULARY = 99, 16, 100
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# LLaVA reads its tower's last layer but one: of two, the other computes what nobody reads. Then the projector's two.
TEXT_LINEARS, TOWER_LINEARS = 2 * 7, 6 + 2


# torch 2.11 fails where it follows LLaVA's count of image tokens.
FOLLOWS = torch.torch_version.TorchVersion(torch.__version__) >= (2, 12)


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=VOCABULARY, eos_token_id=None)
    vision = CLIPVisionConfig(**SIZES, image_size=32, patch_size=8)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def with_image(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, IMAGE, (1, 50), generator=generator)  # more than an example of tokens is cut to
    ids[:, 20 : 20 + PATCHES] = IMAGE
    pixels = torch.randn(1, 3, 32, 32, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def without_image(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, IMAGE, (2, 40), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: nn.Module, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**call, use_cache=False).logits
    return found


@pytest.mark.parametrize("example", [None, without_image()], ids=["images", "tokens"])
def test_a_vision_language_model_is_quantized_in_place(example: Any, tmp_path: Path) -> None:
    model = llava()
    calls = (with_image(5), without_image(6))
    expected = [logits(model, call) for call in calls]
    qcompile.quantize(model, [with_image(seed) for seed in range(3)], example=example)
    names = quantized_linears(model)
    assert len(names) == TEXT_LINEARS + (TOWER_LINEARS if example is None else 0)
    assert any("vision_tower" in name for name in names) == (example is None)
    assert model.qcompile_record.kept.keys() == {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    found = [logits(model, call) for call in calls]
    for y, z in zip(found, expected, strict=True):
        assert_close("int8/model", actual=y, expected=z)

    qcompile.save_pretrained(model, tmp_path / "folder")
    loaded = qcompile.from_pretrained(tmp_path / "folder").eval()
    assert isinstance(loaded, LlavaForConditionalGeneration)
    assert quantized_linears(loaded).keys() == names.keys()
    for y, call in zip(found, calls, strict=True):
        assert torch.equal(logits(loaded, call), y)


def test_it_generates_compiled() -> None:
    model = llava()
    qcompile.quantize(model, [with_image(seed) for seed in range(3)], example=without_image())
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**with_image(7), **options)
    model.compile(backend="w8a8", options={"inner": "eager"})
    assert torch.equal(model.generate(**with_image(7), **options, cache_implementation="static"), expected)


def test_compiled_from_float_with_statistics_of_images() -> None:
    model, call = llava(), with_image(5)
    expected = logits(model, call)
    calibration = qcompile.calibrate(model, [with_image(seed) for seed in range(3)])
    options = {"inner": "eager", "calibration": calibration}
    for follows_numbers in {False, FOLLOWS}:
        torch._dynamo.reset()
        with torch._dynamo.config.patch(capture_scalar_outputs=follows_numbers):
            compiled = torch.compile(model, backend="w8a8", options=options)
            assert_close("int8/model", actual=logits(compiled, call), expected=expected)
