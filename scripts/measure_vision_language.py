"""Vision-language models of transformers: how far from float they are once compiled and once quantized in place, from
calls with an image and from tokens alone. Tiny, random weights, one call; prints a Markdown table.
"""

import argparse
import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import qcompile
from qcompile.capture import capture_call
from qcompile.errors import QCompileError
from qcompile.quantized_linear import quantized_linears
from qcompile.validate import relative_error

IMAGE, FIRST, VOCABULARY = 99, 3, 100  # the token that stands for a part of an image, where the first is
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
PATCHES = (32 // 8) ** 2
Case = tuple[str, Callable[[], nn.Module], dict[str, Any]]


def cases() -> Iterator[Case]:
    t = transformers
    clip, siglip = t.CLIPVisionConfig(**TOWER), t.SiglipVisionConfig(**TOWER)
    llama, wide = t.LlamaConfig(**TEXT), {**TEXT, "head_dim": 16}
    image = {"pixel_values": noise(1, 3, 32, 32)}

    llava = t.LlavaConfig(vision_config=clip, text_config=llama, image_token_id=IMAGE)
    yield "LLaVA", lambda: t.LlavaForConditionalGeneration(llava), call(PATCHES, **image)

    gemma = t.Gemma3Config(
        vision_config=siglip, text_config=t.Gemma3TextConfig(**wide), mm_tokens_per_image=4, image_token_id=IMAGE
    )
    kinds = {"token_type_ids": (call(4)["input_ids"] == IMAGE).long()}
    yield "Gemma 3", lambda: t.Gemma3ForConditionalGeneration(gemma), call(4, **image, **kinds)

    pali = t.PaliGemmaConfig(
        vision_config=siglip, text_config=t.GemmaConfig(**wide), image_token_index=IMAGE, projection_dim=32
    )
    yield "PaliGemma", lambda: t.PaliGemmaForConditionalGeneration(pali), call(PATCHES, **image)

    idefics = t.Idefics3Config(vision_config=TOWER, text_config=llama, image_token_id=IMAGE, scale_factor=2)
    yield "Idefics3", lambda: t.Idefics3ForConditionalGeneration(idefics), call(
        PATCHES // 4, pixel_values=noise(1, 1, 3, 32, 32)
    )  # fmt: skip

    qwen = t.Qwen2_5_VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
            "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
        },
        text_config={**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        image_token_id=IMAGE, vision_start_token_id=98, vision_end_token_id=97, video_token_id=96,
    )  # fmt: skip
    kinds = {"mm_token_type_ids": (call(16)["input_ids"] == IMAGE).long()}
    grid = {"pixel_values": noise(64, 96), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    yield "Qwen2.5-VL", lambda: t.Qwen2_5_VLForConditionalGeneration(qwen), call(16, **grid, **kinds)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def call(tokens: int, **more: Tensor) -> dict[str, Any]:
    """One row of tokens, of which so many stand for an image."""
    ids = torch.randint(0, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    ids[:, FIRST : FIRST + tokens] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def logits(model: Any, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**arguments, use_cache=False).logits
    return found


def graphs(model: nn.Module, arguments: dict[str, Any], follow: bool) -> int:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=follow):
        return len(capture_call(model, {**arguments, "use_cache": False}))


def row(make: Callable[[], nn.Module], arguments: dict[str, Any]) -> str:
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    for parameter in model.parameters():  # biases and gains of fresh models have nothing to get wrong
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits(model, arguments)
    cells = [f"{graphs(model, arguments, False)}, {graphs(model, arguments, True)}"]
    calibration = qcompile.calibrate(model, [arguments])
    compiled = torch.compile(model, backend="w8a8", options={"inner": "eager", "calibration": calibration})
    cells.append(f"{relative_error(logits(compiled, arguments), expected):.1e}")
    for example in (None, {"input_ids": arguments["input_ids"] % 90}):
        changed: Any = copy.deepcopy(model)
        try:
            qcompile.quantize(changed, calibration, example=example)
        except QCompileError as error:
            cells += [str(error).partition(";")[0], "–"]
            continue
        linears = sum(isinstance(module, nn.Linear) for module in model.modules())
        cells.append(f"{relative_error(logits(changed, arguments), expected):.1e}")
        cells.append(f"{len(quantized_linears(changed))} of {linears}")
    return " | ".join(cells)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print("| model | graphs | compiled | from images | in 8 bits | from tokens | in 8 bits |")
    print("|---|---|---|---|---|---|---|")
    for name, make, arguments in cases():
        torch._dynamo.reset()
        print(f"| {name} | {row(make, arguments)} |", flush=True)


if __name__ == "__main__":
    main()
