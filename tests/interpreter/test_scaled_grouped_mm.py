"""The Triton kernel of experts, in Triton's interpreter."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by tests/lowering/test_scaled_mm_kernel.py", allow_module_level=True)

from kernel_checks import SMALL, check_grouped, grouped_product

from qcompile.lowering.tiles import Tile

pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered", "ignore:invalid value encountered", "ignore:Conversion of an array with ndim"
)
# Rows of each expert: of none, one, a whole tile, more than one; experts that are no power of two, one alone.
ROUTINGS = [(1,), (0, 1), (16, 0, 17), (0, 0, 0, 33), (1, 1, 1, 1, 1), (31, 0, 129, 2, 15, 0), (0,) * 70 + (3,)]
EXAMPLES = int(os.environ.get("QCOMPILE_KERNEL_EXAMPLES", "20"))


@pytest.mark.parametrize("rows", ROUTINGS, ids=str)
@pytest.mark.parametrize(("dtype", "swap"), [("int8", False), ("int8", True), ("fp8", False), ("fp8_e5m2", True)])
def test_rows_meet_their_own_expert(rows: tuple[int, ...], swap: bool, dtype: str) -> None:
    check_grouped(grouped_product(rows, 17, 33, dtype), Tile(16, 16, 32, stages=2, group=2, swap=swap))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 32), (129, 65), (4095, 15), (15, 4095)])
def test_odd_weights(n: int, k: int) -> None:
    check_grouped(grouped_product((3, 0, 20), n, k), SMALL)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_and_results(per_token: bool, out_dtype: torch.dtype) -> None:
    check_grouped(grouped_product((5, 2), 20, 40, per_token=per_token, out_dtype=out_dtype), SMALL)


def test_strides() -> None:
    """A stack that is a transpose of what is stored, rows that lie apart, offsets of 64 bits."""
    found = grouped_product((7, 0, 12), 24, 40)
    found.weight = found.weight.transpose(-2, -1).contiguous().transpose(-2, -1)
    found.x = torch.cat([found.x, found.x], 1)[:, :40]
    found.offsets = found.offsets.to(torch.int64)
    assert found.weight.stride(-1) != 1
    check_grouped(found, SMALL)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_routing(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.one_of(st.just(0), st.integers(0, 40)), min_size=1, max_size=12))
    n, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    tile = Tile(data.draw(st.sampled_from((16, 32))), 16, 32, stages=2, group=data.draw(st.integers(1, 9)))
    check_grouped(grouped_product(tuple(rows), n, k), tile)


def test_no_rows() -> None:
    assert grouped_product((0, 0), 8, 8).run(SMALL).shape == (0, 8)
