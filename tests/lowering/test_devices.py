"""The device table: what each generation gets, and what one that is not in it does."""

import pytest

from qcompile.lowering.devices import DEVICES, device_of, without_fp8, without_triton
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import packaged


@pytest.mark.parametrize(
    ("capability", "triton", "fp8"),
    [(70, False, False), (75, False, False), (80, True, False), (86, True, False), (89, True, True), (90, True, True),
     (100, True, True), (120, True, True)],
)  # fmt: skip
def test_the_table(capability: int, triton: bool, fp8: bool) -> None:
    target = Target("cuda", capability)
    assert (without_triton(target) == "") is triton
    assert (without_fp8(target) == "") is fp8
    device = device_of(target)
    assert device is not None
    assert device.capability == capability
    assert {row.dtype for row in packaged(device.table).rows} >= ({"int8", "fp8"} if fp8 else {"int8"})


def test_rows_are_in_order_and_there_is_one_each() -> None:
    capabilities = [device.capability for device in DEVICES]
    assert capabilities == sorted(set(capabilities))


@pytest.mark.parametrize(("capability", "fp8"), [(87, False), (103, True), (121, True), (130, True)])
def test_a_gpu_that_is_not_in_the_table_gets_what_fits_everywhere(capability: int, fp8: bool) -> None:
    device = device_of(Target("cuda", capability))
    assert device is not None
    assert device.table == "sm86"
    assert device.shared == 99 * 1024
    assert device.fp8 is fp8


def test_the_number_of_processors_is_the_cards_own_if_it_says_so() -> None:
    usual, own = device_of(Target("cuda", 90)), device_of(Target("cuda", 90, processors=114))
    assert usual is not None
    assert own is not None
    assert (usual.processors, own.processors) == (132, 114)


@pytest.mark.parametrize("target", [Target("cpu"), Target("hip", name="AMD Instinct MI300X"), Target("cuda", 61)])
def test_everything_else_is_refused(target: Target) -> None:
    assert device_of(target) is None
    assert str(target) in without_triton(target)
    assert without_fp8(target)
