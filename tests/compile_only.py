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
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from qcompile.lowering import scaled_grouped_mm_kernel, scaled_mm_hopper
from qcompile.lowering.attention_cuda import choose_block, choose_warps, rounded
from qcompile.lowering.attention_kernel import attention_kernel
from qcompile.lowering.scaled_mm_kernel import scaled_mm_kernel
from qcompile.lowering.tiles import Tile

ELEMENTS = {"int8": gl.int8, "fp8": gl.float8e4nv, "fp8_e5m2": gl.float8e5}
POINTERS = {"int8": "*i8", "fp8": "*fp8e4nv", "fp8_e5m2": "*fp8e5"}
INSTRUCTION = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.([\w.:]+)")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """shared: bytes of shared memory. stack: bytes per thread, which is where spilled registers go. instructions: the
    matrix instructions, with their operand types. tma: whether operands are loaded by tensor memory access. ptx: the
    assembler's input."""

    shared: int
    stack: int
    instructions: frozenset[tuple[str, str]]
    tma: bool
    ptx: str = dataclasses.field(repr=False)


def compile_tile(
    tile: Tile, dtype: str, capability: int, *, activation: str = "gelu", extras: bool = True, even: bool = False
) -> Compiled:
    """The kernel for one tile, operands contiguous and 16-byte aligned; with the longest epilogue unless told."""
    if tile.hopper:
        return _compile_hopper(tile, dtype, activation, extras)
    constants: dict[str, Any] = {
        "IS_INT8": dtype == "int8", "HAS_BIAS": extras, "HAS_RESIDUAL": extras, "ACTIVATION": activation,
        "EVEN_K": even, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group, "SPLIT_K": tile.split, "SWAP": tile.swap, "TMA": tile.tma,
        **dict.fromkeys(("x_column", "weight_column", "scale_row", "residual_column"), 1),
    }  # fmt: skip
    sums = "*i32" if dtype == "int8" else "*fp32"
    types = {
        "x": POINTERS[dtype], "weight": POINTERS[dtype], "x_scale": "*fp32", "weight_scale": "*fp32",
        "bias": "*bf16", "residual": "*bf16", "out": sums if tile.split > 1 else "*bf16",
    }  # fmt: skip
    return _compiled(scaled_mm_kernel, constants, types, capability, tile.warps, tile.stages)


def compile_grouped(tile: Tile, dtype: str, capability: int, experts: int) -> Compiled:
    """That of scaled_grouped_mm_kernel, operands contiguous and 16-byte aligned, for so many experts."""
    options = scaled_grouped_mm_kernel.constants(tile, dtype == "int8", 1, experts)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    constants: dict[str, Any] = {
        **options, "GROUP_M": tile.group, **dict.fromkeys(("x_column", "weight_column", "scale_row"), 1),
    }  # fmt: skip
    types = {
        "x": POINTERS[dtype], "weight": POINTERS[dtype], "x_scale": "*fp32", "weight_scale": "*fp32",
        "offsets": "*i32", "out": "*bf16",
    }  # fmt: skip
    kernel = scaled_grouped_mm_kernel.scaled_grouped_mm_kernel
    return _compiled(kernel, constants, types, capability, warps, stages)


def _compile_hopper(tile: Tile, dtype: str, activation: str, extras: bool) -> Compiled:
    """That of scaled_mm_hopper, for sm90."""
    kernel, options = scaled_mm_hopper.scaled_mm_kernel, {"num_warps": tile.warps}
    constants: dict[str, Any] = {
        "IS_INT8": dtype == "int8", "HAS_BIAS": extras, "HAS_RESIDUAL": extras, "ACTIVATION": activation,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "STAGES": tile.stages,
        "COLUMNS": scaled_mm_hopper.COLUMNS[activation], "LOADING_REGISTERS": scaled_mm_hopper.LOADING_REGISTERS,
        "MULTIPLYING_REGISTERS": scaled_mm_hopper.MULTIPLYING_REGISTERS, "num_warps": tile.warps, "scale_row": 1,
        "residual_column": 1,
    }  # fmt: skip
    types = dict.fromkeys(("x_scale", "weight_scale"), "*fp32") | dict.fromkeys(("bias", "residual", "out"), "*bf16")
    for name, rows in (("x", tile.block_m), ("weight", tile.block_n)):
        shape = [rows, tile.block_k]
        layout = gl.NVMMASharedLayout.get_default_for(shape, ELEMENTS[dtype])
        types[name] = f"tensordesc<{POINTERS[dtype][1:]}{shape},{layout!r}>"
    return _built(GluonASTSource(kernel, *_signature(kernel.arg_names, constants, types)), 90, options)


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
    source = ASTSource(kernel, *_signature(kernel.arg_names, constants, types))
    return _built(source, capability, {"num_warps": warps, "num_stages": stages})


def _signature(
    names: list[str], constants: dict[str, Any], types: dict[str, str]
) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """What a source wants to know of its arguments: types, constants, and that all are multiples of 16."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    known = {name for name, kind in signature.items() if kind == "constexpr" or kind.startswith("tensordesc")}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in known}
    return signature, constexprs, aligned


def _built(source: ASTSource, capability: int, options: dict[str, int]) -> Compiled:
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    instructions = frozenset(INSTRUCTION.findall(built.asm["ptx"]))
    tma = "cp.async.bulk.tensor" in built.asm["ptx"]
    return Compiled(built.metadata.shared, _stack(built.asm["cubin"]), instructions, tma, built.asm["ptx"])


def _stack(cubin: bytes) -> int:
    """Bytes per thread of stack and local memory, by cuobjdump of Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    stack, local = re.search(r"STACK:(\d+)", printed), re.search(r"LOCAL:(\d+)", printed)
    assert stack is not None, printed
    return int(stack[1]) + (int(local[1]) if local else 0)
