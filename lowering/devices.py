"""The device table: what each generation of NVIDIA GPU gets. Data and predicates, no torch.cuda."""

import dataclasses

from qcompile.lowering.target import Target

KIB = 1024


@dataclasses.dataclass(frozen=True)
class Device:
    """One compute capability.

    capability: 10·major + minor. shared: bytes of shared memory that a block may use. processors: multiprocessors of
    the usual card, for when the target does not say. triton: whether current Triton compiles for it. int8_cores: has
    int8 matrix instructions, through cuBLAS at least. fp8: has fp8 matrix instructions. tma: has tensor memory access.
    table: which of lowering/tiles its tile choice starts from. instruction: what int8 and fp8 products must compile to.
    """

    capability: int
    shared: int
    processors: int
    triton: bool = True
    int8_cores: bool = True
    fp8: bool = True
    tma: bool = False
    table: str = "sm86"
    instruction: tuple[str, str] = ("mma.sync", "mma.sync")

    @property
    def is_hopper(self) -> bool:
        """Whether `scaled_mm_hopper` runs on it; newer GPUs have no wgmma."""
        return self.instruction[0] == "wgmma"


DEVICES = (
    Device(70, 96 * KIB, 80, triton=False, int8_cores=False, fp8=False),
    Device(75, 64 * KIB, 40, triton=False, fp8=False),
    Device(80, 163 * KIB, 108, fp8=False, table="sm80"),
    Device(86, 99 * KIB, 84, fp8=False),
    Device(89, 99 * KIB, 128),
    Device(90, 227 * KIB, 132, tma=True, table="sm90", instruction=("wgmma", "wgmma")),
    # Before 3.8 Triton has no int8 form of tcgen05: int8 goes through the older instruction, fp8 through the new one.
    Device(100, 227 * KIB, 148, tma=True, table="sm100", instruction=("mma.sync", "tcgen05.mma")),
    Device(120, 99 * KIB, 170, tma=True),
)


def device_of(target: Target) -> Device | None:
    """The table's row for a target: its own, or, for one that is not in it, the nearest older one's abilities with the
    tiles that fit everywhere. None if the target is no NVIDIA GPU, or older than the table.
    """
    if target.kind != "cuda":
        return None
    older = [device for device in DEVICES if device.capability <= target.capability]
    if not older:
        return None
    found = older[-1]
    if found.capability != target.capability:
        least = min(found.shared, 99 * KIB)
        found = dataclasses.replace(found, capability=target.capability, shared=least, table="sm86")
    return dataclasses.replace(found, processors=target.processors or found.processors)


def without_triton(target: Target) -> str:
    """Why Triton kernels cannot run on a target; empty if they can."""
    device = device_of(target)
    if device is None or not device.triton:
        return f"needs an NVIDIA GPU of compute capability 8.0 or newer, the target is {target}"
    return ""


def without_fp8(target: Target) -> str:
    """Why a CUDA target has no fp8 arithmetic; empty if it has."""
    device = device_of(target)
    return "" if device is not None and device.fp8 else f"fp8 needs compute capability 8.9 or newer; this is {target}"
