"""Models of timm, diffusers and PEFT, which are no part of transformers: how far from float they are once compiled and
once quantized in place, and which linears stay in float. Random weights, one call each; prints a Markdown table.

Needs `pip install timm diffusers peft`.
"""

import argparse
import collections
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import qcompile
from qcompile.errors import QCompileError
from qcompile.quantized_linear import quantized_linears
from qcompile.validate import relative_error

Case = tuple[str, Callable[[], nn.Module], dict[str, Any]]
IMAGES = (
    "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "eva02_tiny_patch14_224",
    "xcit_nano_12_p16_224", "cait_xxs24_224", "maxvit_rmlp_pico_rw_256", "pvt_v2_b0",
)  # fmt: skip
ADAPTERS = {"LoRA": {}, "DoRA": {"use_dora": True}, "LoRA with biases": {"lora_bias": True}}


def images() -> Iterator[Case]:
    import timm

    for name in IMAGES:
        size = 256 if name.endswith("256") else 224
        yield f"timm {name}", lambda name=name: timm.create_model(name), {"x": noise(2, 3, size, size)}


def diffusion() -> Iterator[Case]:
    import diffusers

    steps, text = torch.tensor([3, 5]), noise(2, 5, 32)
    yield "diffusers DiT", lambda: diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    ), {"hidden_states": noise(2, 4, 8, 8), "timestep": steps, "class_labels": torch.tensor([1, 2])}  # fmt: skip
    yield "diffusers SD3", lambda: diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
    ), {
        "hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": text, "pooled_projections": noise(2, 64),
        "timestep": steps,
    }  # fmt: skip
    yield "diffusers Flux", lambda: diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    ), {
        "hidden_states": noise(1, 16, 4), "encoder_hidden_states": noise(1, 6, 32), "timestep": torch.tensor([1.0]),
        "pooled_projections": noise(1, 32), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3),
    }  # fmt: skip
    yield "diffusers UNet of Stable Diffusion", lambda: diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), norm_num_groups=4, layers_per_block=1, sample_size=16, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ), {"sample": noise(2, 4, 16, 16), "timestep": torch.tensor(10), "encoder_hidden_states": text}  # fmt: skip
    yield "diffusers PixArt", lambda: diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=2, sample_size=128,
        cross_attention_dim=48, caption_channels=32, use_additional_conditions=True,
    ), {
        "hidden_states": noise(2, 4, 16, 16), "encoder_hidden_states": text, "timestep": steps,
        "added_cond_kwargs": {"resolution": noise(2, 2), "aspect_ratio": noise(2, 1)},
    }  # fmt: skip
    yield "diffusers Wan", lambda: diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    ), {
        "hidden_states": noise(1, 4, 2, 16, 16), "timestep": torch.tensor([3]),
        "encoder_hidden_states": noise(1, 9, 16),
    }  # fmt: skip


def adapters() -> Iterator[Case]:
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=64, initializer_range=0.2)
    for name, options in ADAPTERS.items():
        lora = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, **options)
        yield f"PEFT {name} on Llama", lambda lora=lora: peft.get_peft_model(LlamaForCausalLM(config), lora), {
            "input_ids": torch.arange(1, 19).reshape(2, 9)
        }  # fmt: skip


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def first_output(model: Any, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found = model(**call)
    found = found if isinstance(found, Tensor) else next(iter(found.values()))
    assert isinstance(found, Tensor)
    return found


def measured(make: Callable[[], nn.Module], call: dict[str, Any]) -> str:
    """Linears; the relative L2 error of what is compiled, smoothed in place in float32, and quantized; what stays."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and gains of fresh models have nothing to get wrong
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    expected = first_output(model, call)
    calibration = qcompile.calibrate(model, [call], ignore=())
    options = {"inner": "eager", "calibration": calibration, "ignore": ()}
    compiled = first_output(torch.compile(model, backend="w8a8", options=options), call)
    cells = [
        str(sum(isinstance(module, nn.Linear) for module in model.modules())),
        f"{relative_error(compiled, expected):.1e}",
    ]
    try:
        quantized: Any = qcompile.quantize(copy.deepcopy(model), calibration, ignore=())
        smoothed = first_output(qcompile.smooth(copy.deepcopy(model), calibration, ignore=()), call)
    except QCompileError as error:
        return " | ".join([*cells, "–", "–", "–", str(error).partition(";")[0]])
    cells += [f"{relative_error(y, expected):.1e}" for y in (first_output(quantized, call), smoothed)]
    kept = collections.Counter(quantized.qcompile_record.kept.values())
    told = "; ".join(f"{count}: {reason}" for reason, count in kept.items())
    return " | ".join([*cells, str(len(quantized_linears(quantized))), told or "–"])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    print("| model | linears | compiled | quantized | smoothed | in 8 bits | in float |")
    print("|---|---|---|---|---|---|---|")
    for name, make, call in (*images(), *diffusion(), *adapters()):
        torch._dynamo.reset()
        print(f"| {name} | {measured(make, call)} |", flush=True)


if __name__ == "__main__":
    main()
