"""The numbers of the attention kernel, in Triton's interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by tests/lowering/test_scaled_mm_kernel.py", allow_module_level=True)

import attention_checks
from attention_checks import MASKS, Case, check, run

# NumPy's, which Triton interprets with; the last is Triton 3.6's doing.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered", "ignore:invalid value encountered", "ignore:Conversion of an array with ndim"
)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_every_mask_in_any_number_of_parts(mask: str, parts: int) -> None:
    check(Case(mask=mask, parts=parts))


@pytest.mark.parametrize("keys", [1, 15, 16, 17, 127, 128, 129, 400])
@pytest.mark.parametrize("parts", [1, 4])
def test_any_number_of_keys(keys: int, parts: int) -> None:
    check(Case(keys=keys, parts=parts, mask="bool"))


@pytest.mark.parametrize("channels", [(1, 0), (8, 0), (24, 0), (80, 0), (128, 0), (40, 24), (16, 72), (256, 0)])
def test_any_number_of_channels(channels: tuple[int, int]) -> None:
    check(Case(channels=channels[0], value_channels=channels[1], keys=40, mask="float"))


@pytest.mark.parametrize("shares", [1, 4, 16, 17, 71])
def test_any_number_of_heads_that_share_a_key(shares: int) -> None:
    check(Case(shares=shares, groups=1, keys=33, mask="heads"))


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_dtype(dtype: torch.dtype, mask: str) -> None:
    """But bfloat16, whose bits the interpreter multiplies as integers: tests/gpu has that."""
    check(Case(dtype=dtype, mask=mask, channels=64, keys=140))


def test_any_strides() -> None:
    """A cache that is [B, S, G, D] in memory, a query that is a slice, a mask with every second key."""
    random = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 3, 50, 2, 16, generator=random).transpose(2, 3)
    query = torch.randn(3, 1, 4, 48, generator=random).transpose(1, 2)[..., 16:32]
    mask = torch.rand(3, 1, 1, 100, generator=random)[..., ::2] > 0.5
    plain = run(*(x.contiguous() for x in (query, key, value, mask)), 0.3, 2)
    assert torch.equal(run(query, key, value, mask, 0.3, 2), plain)


def test_a_row_that_a_large_finite_number_hides_is_the_mean() -> None:
    query, key, value, _ = Case().operands("cpu")
    mask = torch.full((2, 1, 1, 70), torch.finfo(torch.float32).min)
    expected = value.repeat_interleave(3, 1).mean(2, keepdim=True)
    attention_checks.assert_close("attention/float32", actual=run(query, key, value, mask, 0.3, 1), expected=expected)


def test_no_sequences() -> None:
    query, key, value, _ = Case(batch=1).operands("cpu")
    assert run(query[:0], key[:0], value[:0], None, 0.3, 2).shape == (0, 6, 1, 16)


def test_nan_and_infinity_are_not_hidden() -> None:
    query, key, value, _ = Case().operands("cpu")
    for place in (key, value):
        broken = place.clone()
        broken[0, 1, 7, 3] = torch.nan
        y = run(query, *((broken, value) if place is key else (key, broken)), None, 0.3, 2)
        assert y[0, 3:].isnan().any()
        assert not y[1].isnan().any()


def test_large_scores_do_not_overflow() -> None:
    query, key, value, _ = Case().operands("cpu")
    y = run(1e6 * query, key, value, None, 0.3, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(
        1e6 * query.double(), *(x.double().repeat_interleave(3, 1) for x in (key, value)), scale=0.3
    )
    attention_checks.assert_close("attention/float32", actual=y.double(), expected=expected)
