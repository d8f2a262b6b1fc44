"""Triton kernels compiled for GPUs that are not here, and what the assembler says of the result."""

import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qcompile.lowering.attention_cuda import choose_block, choose_warps, rounded
from qcompile.lowering.attention_kernel import attention_kernel
from qcompile.lowering.scaled_mm_kernel import scaled_mm_kernel
from qcompile.lowering.tiles import Tile

POINTERS = {"int8": "*i8", "fp8": "*fp8e4nv", "fp8_e5m2": "*fp8e5"}
INSTRUCTION = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.([\w.:]+)")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """shared: bytes of shared memory. stack: bytes per thread, which is where spilled registers go. instructions: the
    matrix instructions, with their operand types. tma: whether operands are loaded by tensor memory access."""

    shared: int
    stack: int
    instructions: frozenset[tuple[str, str]]
    tma: bool


def compile_tile(
    tile: Tile, dtype: str, capability: int, *, activation: str = "gelu", extras: bool = True, even: bool = False
) -> Compiled:
    """The kernel for one tile, operands contiguous and 16-byte aligned; with the longest epilogue unless told."""
    constants: dict[str, Any] = {
        "IS_INT8": dtype == "int8", "HAS_BIAS": extras, "HAS_RESIDUAL": extras, "ACTIVATION": activation,
        "EVEN_K": even, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group, "SPLIT_K": tile.split, "SWAP": tile.swap, "PERSISTENT": tile.programs > 0,
        "TMA": tile.tma,
        **dict.fromkeys(("x_column", "weight_column", "scale_row", "residual_column"), 1),
    }  # fmt: skip
    sums = "*i32" if dtype == "int8" else "*fp32"
    types = {
        "x": POINTERS[dtype], "weight": POINTERS[dtype], "x_scale": "*fp32", "weight_scale": "*fp32",
        "bias": "*bf16", "residual": "*bf16", "out": sums if tile.split > 1 else "*bf16",
    }  # fmt: skip
    return _compiled(scaled_mm_kernel, constants, types, capability, tile.warps, tile.stages)


def compile_attention(
    shares: int, channels: int, mask: str, dtype: str, capability: int, value_channels: int = 0
) -> Compiled:
    """The kernel for so many query heads per key head and channels, everything contiguous and 16-byte aligned.

    mask: "", "bool" or "float"; dtype: as Triton writes it, "bf16" for one.
    """
    value_channels = value_channels or channels
    heads, widest = rounded(shares), max(rounded(channels), rounded(value_channels))
    size = 4 if dtype == "fp32" else 2
    constants: dict[str, Any] = {
        "SCALE": 0.125, "SHARES": shares, "CHANNELS": channels, "VALUE_CHANNELS": value_channels, "PARTS": 4,
        "MASK": mask, "BLOCK_HEADS": heads, "BLOCK_KEYS": choose_block(heads, widest * size),
        "BLOCK_CHANNELS": rounded(channels), "BLOCK_VALUE_CHANNELS": rounded(value_channels), "mask_head": 0,
        **dict.fromkeys(("query_channel", "key_channel", "value_channel", "mask_key"), 1),
    }  # fmt: skip
    pointer = f"*{dtype}"
    types = {
        "query": pointer, "key": pointer, "value": pointer, "mask": "*i1" if mask == "bool" else pointer,
        "out": "*fp32", "size": "*fp32",
    }  # fmt: skip
    return _compiled(attention_kernel, constants, types, capability, choose_warps(heads, widest), 2)


def _compiled(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], capability: int, warps: int, stages: int
) -> Compiled:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    source = ASTSource(kernel, signature, constexprs, aligned)
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=target, options=options)
    instructions = frozenset(INSTRUCTION.findall(built.asm["ptx"]))
    tma = "cp.async.bulk.tensor" in built.asm["ptx"]
    return Compiled(built.metadata.shared, _stack(built.asm["cubin"]), instructions, tma)


def _stack(cubin: bytes) -> int:
    """Bytes per thread of stack and local memory, by cuobjdump of Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    stack, local = re.search(r"STACK:(\d+)", printed), re.search(r"LOCAL:(\d+)", printed)
    assert stack is not None, printed
    return int(stack[1]) + (int(local[1]) if local else 0)
