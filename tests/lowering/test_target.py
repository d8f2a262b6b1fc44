"""Targets are values; detection is one function at the edge."""

import dataclasses
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qcompile.errors import ConfigError
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
        (Target("hip", name="AMD Instinct MI300X"), "hip (AMD Instinct MI300X)"),
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
        ({"avx2": True, "f16c": True, "avx512_f": True, "avx512_bw": True}, {"avx2"}),
        ({"avx2": True}, set()),
        (dict.fromkeys(["avx2", "f16c", "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"], True), {"avx2", "avx512"}),
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
    properties = SimpleNamespace(major=8, minor=9, name="NVIDIA L4", multi_processor_count=58)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    target.detect.cache_clear()
    assert target.detect(torch.device("cuda", 0)) == Target("cuda", 89, name="NVIDIA L4", processors=58)
    target.detect.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert target.detect(torch.device("cuda", 0)) == Target("hip", name="NVIDIA L4", processors=58)
    target.detect.cache_clear()


@pytest.mark.parametrize(("text", "capability"), [("sm90", 90), ("sm_89", 89), ("sm100", 100), ("sm90a", 90)])
def test_a_gpu_that_is_not_here_is_named_by_its_capability(text: str, capability: int) -> None:
    assert Target.parse(text) == Target("cuda", capability)


@pytest.mark.parametrize("text", ["", "90", "sm", "sm9", "h100", "sm90b", "sm1000"])
def test_a_malformed_target_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="such as sm90; got"):
        Target.parse(text)


@pytest.mark.parametrize("features", [set(), {"avx2"}, {"avx2", "avx512"}, {"avx2", "avx512", "avx512_vnni"}], ids=len)
def test_an_older_torch_is_asked_in_its_own_way(features: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for name in ("avx2", "avx512", "avx512_vnni"):
        asked = f"_is_{name.removeprefix('avx512_')}_supported"
        monkeypatch.setattr(torch.cpu, asked, lambda name=name: name in features)
    assert target._cpu_features() == features


@pytest.mark.skipif(platform.system() != "Linux", reason="reads what Linux knows about the processor")
def test_features_are_those_the_system_reports() -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("this processor lists no flags")
    found = target.detect(torch.device("cpu")).features
    assert ("avx512_vnni" in found) == ("avx512_vnni" in flags)
    assert ("avx512" in found) == ({"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags))
    assert ("avx2" in found) == ({"avx2", "f16c"} <= set(flags))
