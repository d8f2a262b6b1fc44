"""What a machine can run, as a value. Detected once at the edge and passed in, so any machine can lower for another."""

import dataclasses
import functools
import re
from typing import Any

import torch

from qcompile.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Target:
    """kind: "cpu", "cuda" (NVIDIA) or "hip" (AMD). capability: CUDA compute capability as 10·major + minor, else 0.
    features: instruction sets the CPU reports that a kernel here cares about. name, processors: the GPU's product name
    and multiprocessors; "" and 0 mean the usual card of that capability."""

    kind: str
    capability: int = 0
    features: frozenset[str] = frozenset()
    name: str = ""
    processors: int = 0

    @classmethod
    def parse(cls, text: str) -> "Target":
        """ "sm90", say, as a GPU that need not be here. Raises ConfigError."""
        if not (match := re.fullmatch(r"sm_?(\d{2,3})a?", text)):
            raise ConfigError(f"a target must be a compute capability such as sm90; got {text!r}")
        return cls("cuda", int(match[1]))

    def __str__(self) -> str:
        detail = f"sm{self.capability}" if self.kind == "cuda" else ", ".join(sorted(self.features)) or "plain"
        detail = self.name if self.kind == "hip" else detail
        return f"{self.kind} ({detail})"


# A feature, and what torch.cpu.get_capabilities() has to report for it.
CPU_FEATURES = {
    "avx2": ("avx2", "f16c"),
    "avx512": ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"),
    "avx512_vnni": ("avx512_vnni",),
    "avx_vnni": ("avx_vnni",),
    "amx_int8": ("amx_int8",),
}


@functools.cache
def detect(device: torch.device) -> Target:
    """The target behind a device of this machine."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            return Target("hip", name=properties.name, processors=properties.multi_processor_count)
        capability = 10 * properties.major + properties.minor
        return Target("cuda", capability, name=properties.name, processors=properties.multi_processor_count)
    return Target(device.type, 0, _cpu_features())


def _cpu_features() -> frozenset[str]:
    report: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if report:
        return frozenset(name for name, keys in CPU_FEATURES.items() if all(map(report.get, keys)))
    asked = {
        "avx2": torch.cpu._is_avx2_supported,
        "avx512": torch.cpu._is_avx512_supported,
        "avx512_vnni": torch.cpu._is_vnni_supported,
    }
    return frozenset(name for name, ask in asked.items() if ask())
