"""Targets are values; detection is one function at the edge."""

import dataclasses

import pytest
import torch

from qcompile.lowering import target
from qcompile.lowering.target import Target


def test_target_is_a_frozen_value() -> None:
    assert Target("cuda", 90) == Target("cuda", 90)
    assert hash(Target("cpu", 0, frozenset({"amx_int8"}))) != hash(Target("cpu"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Target("cpu").kind = "cuda"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Target("cuda", 90), "cuda (sm90)"),
        (Target("cpu", 0, frozenset({"avx512_vnni", "amx_int8"})), "cpu (amx_int8, avx512_vnni)"),
        (Target("cpu"), "cpu (plain)"),
    ],
)
def test_target_reads_well(value: Target, text: str) -> None:
    assert str(value) == text


@pytest.mark.parametrize(
    ("report", "features"),
    [
        ({"avx512_vnni": True, "avx_vnni": False, "sse2": True}, {"avx512_vnni"}),
        ({"avx512_vnni": True, "amx_int8": True}, {"avx512_vnni", "amx_int8"}),
        ({"sse2": True}, set()),
    ],
)
def test_cpu_features_come_from_what_the_cpu_reports(
    report: dict[str, bool], features: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: report)
    target.detect.cache_clear()
    try:
        assert target.detect(torch.device("cpu")) == Target("cpu", 0, frozenset(features))
    finally:
        target.detect.cache_clear()


def test_a_cuda_device_has_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    target.detect.cache_clear()
    assert target.detect(torch.device("cuda", 0)) == Target("cuda", 89)
    target.detect.cache_clear()
