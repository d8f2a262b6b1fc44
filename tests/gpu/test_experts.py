"""Experts on the GPU that is here: the kernel's numbers, CUDA graphs over any routing, a model against the CPU."""

from typing import Any

import pytest
import torch
from compiling import compiled
from kernel_checks import SMALL, check_grouped, fraction_bits, grouped_product
from tolerances import assert_close
from transformers import MixtralConfig, MixtralForCausalLM

from qcompile.lowering.devices import device_of
from qcompile.lowering.target import detect
from qcompile.lowering.tiles import Tile, choose_tile

ROUTINGS = [(1,), (0, 1), (16, 0, 17), (0, 0, 0, 33), (1,) * 9, (31, 0, 129, 2, 15, 0), (0,) * 70 + (3,), (900, 7)]


def dtypes() -> list[str]:
    return ["int8", "fp8"] if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9) else ["int8"]


def bits() -> int:
    major, minor = torch.cuda.get_device_capability()
    return fraction_bits(10 * major + minor)


def chosen(rows: tuple[int, ...], n: int, k: int, dtype: str) -> Tile:
    target = detect(torch.device("cuda", 0))
    device = device_of(target)
    assert device is not None
    return choose_tile(max(1, sum(rows) // len(rows)), n, k, dtype, device, name=target.name)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("rows", ROUTINGS, ids=str)
def test_rows_meet_their_own_expert(rows: tuple[int, ...], dtype: str) -> None:
    for n, k in ((17, 33), (129, 64), (1536, 2048)):
        found = grouped_product(rows, n, k, dtype, device="cuda")
        if k > 1024 and dtype == "int8":
            found.weight //= 4
        for tile in (SMALL, chosen(rows, n, k, dtype)):
            check_grouped(found, tile, bits())


def mixtral(met: int = 4) -> Any:
    """Every token meets every expert unless told: a rounding changes no pick then."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=met,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_model_against_the_cpu(dtype: str, implementation: str) -> None:
    """batched_mm is what transformers' generate decodes with on GPUs."""
    model, ids = mixtral(), torch.randint(0, 64, (2, 33))
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        expected = compiled(model, dtype=dtype)(input_ids=ids, use_cache=False).logits
        actual = compiled(model.cuda(), dtype=dtype, inner="inductor")(input_ids=ids.cuda(), use_cache=False).logits
    assert_close(f"{dtype}/another device", actual=actual.cpu(), expected=expected)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_cuda_graphs_serve_any_routing() -> None:
    """Picked by the router this time, other experts with every input."""
    model = mixtral(1).cuda().bfloat16()
    plain, graphed = compiled(model, inner="inductor"), compiled(model, inner="inductor", mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(5):
            ids = torch.randint(0, 64, (1, 5), generator=torch.Generator().manual_seed(seed)).cuda()
            expected = plain(input_ids=ids, use_cache=False).logits
            assert torch.equal(graphed(input_ids=ids, use_cache=False).logits.clone(), expected)
