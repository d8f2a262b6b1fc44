"""The experiment of scripts/norm_scaled_mm.py computes what norm, quantize and product do.

In int8: where a GPU rounds to fp8, the interpreter cuts off.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by tests/lowering/test_scaled_mm_kernel.py", allow_module_level=True)

from running_scripts import script

from qcompile import ops

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")  # Triton 3.6's doing
experiment = script("norm_scaled_mm")


@pytest.mark.parametrize(("m", "n", "k"), [(1, 33, 300), (16, 64, 512), (5, 40, 257), (3, 1, 1)])
def test_it_is_norm_quantize_and_product(m: int, n: int, k: int) -> None:
    torch.manual_seed(0)
    x, gain = torch.randn(m, k), torch.randn(k)
    x[-1] *= 1e-3
    weight, weight_scale = ops.quantize(torch.randn(n, k), [], "row", torch.int8)
    q, scale = ops.quantize(torch.nn.functional.rms_norm(x, (k,), gain, 1e-6), [], "row", torch.int8)
    expected = ops.scaled_mm(q, weight, scale, weight_scale, None, None, None, torch.float32)
    actual = experiment.norm_scaled_mm(x, gain, weight, weight_scale, epsilon=1e-6)
    # A value beside a rounding boundary may fall to the other side of it: one step of one input.
    step = scale[:, None] * weight_scale * 127
    assert ((actual - expected).abs() <= step + 1e-5 * expected.abs()).all()
    assert (actual - expected).norm() <= 1e-3 * expected.norm()


def test_rows_of_zeros_stay_zeros() -> None:
    weight, weight_scale = ops.quantize(torch.randn(8, 64), [], "row", torch.int8)
    y = experiment.norm_scaled_mm(torch.zeros(2, 64), torch.ones(64), weight, weight_scale, epsilon=1e-6)
    assert torch.equal(y, torch.zeros(2, 8))
