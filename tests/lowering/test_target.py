"""Targets are values; detection is one function at the edge."""

import dataclasses
import platform
from pathlib import Path

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


@pytest.mark.parametrize("vnni", [True, False])
def test_an_older_torch_is_asked_in_its_own_way(vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    assert target._cpu_features() == ({"avx512_vnni"} if vnni else set())


@pytest.mark.skipif(platform.system() != "Linux", reason="reads what Linux knows about the processor")
def test_features_are_those_the_system_reports() -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("this processor lists no flags")
    assert ("avx512_vnni" in target.detect(torch.device("cpu")).features) == ("avx512_vnni" in flags)
