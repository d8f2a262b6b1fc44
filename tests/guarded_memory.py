"""Tensors that end where readable memory ends: a kernel that reads or writes one byte too far is killed."""

import ctypes
import itertools
import mmap

import torch
from torch import Tensor

from qcompile.lowering import attention_cpu, cpu_library, scaled_mm_avx, scaled_mm_vnni, unsigned
from qcompile.lowering.target import detect

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
FAILED = ctypes.c_void_p(-1).value


def guarded(tensor: Tensor) -> Tensor:
    """A copy of a contiguous tensor, directly before a page that nobody may touch. Never freed."""
    pages = -(-tensor.nbytes // PAGE) + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = LIBC.mmap(None, pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert address != FAILED
    end = address + (pages - 1) * PAGE
    assert LIBC.mprotect(end, PAGE, 0) == 0
    if not tensor.nbytes:
        return tensor
    memory = (ctypes.c_char * tensor.nbytes).from_address(end - tensor.nbytes)
    return torch.frombuffer(memory, dtype=tensor.dtype).reshape(tensor.shape).copy_(tensor)


def products() -> None:
    """scaled_mm over sizes on both sides of every edge it has."""
    assert not scaled_mm_vnni.runs_on(detect(torch.device("cpu")))
    kernel = torch.ops.qcompile_cpu.scaled_mm.default
    sizes = [(1, 1), (5, 3), (12, 64), (13, 65), (29, 130), (17, 4096), (3, 2816)]
    for tokens, (n, k) in itertools.product((1, 2, 3, 8, 9, 10, 11, 13, 16, 17, 24, 25, 33, 41, 65), sizes):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randint(1, 256, (tokens, k), dtype=torch.uint8)
            weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
            floats = torch.rand(tokens), torch.rand(n), unsigned.compensation(weight), torch.rand(n)
            operands = [x, weight, *floats, torch.rand(tokens, n).to(dtype)]
            assert torch.equal(kernel(*map(guarded, operands), dtype), kernel(*operands, dtype))


def avx512() -> None:
    """The kernel without VNNI, likewise."""
    _signed_products(scaled_mm_avx.AVX512)


def avx2() -> None:
    """The same in narrower vectors."""
    _signed_products(scaled_mm_avx.AVX2)


def _signed_products(form: scaled_mm_avx.Avx) -> None:
    assert not form.runs_on(detect(torch.device("cpu")))
    kernel = getattr(torch.ops.qcompile_cpu, form.operator).default
    sizes = [(1, 1), (5, 3), (8, 32), (13, 65), (9, 130), (17, 2049), (3, 2816), (66, 40)]
    for tokens, (n, k) in itertools.product((1, 2, 3, 8, 12, 13, 16, 17, 33, 65, 97), sizes):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randint(-127, 128, (tokens, k), dtype=torch.int8)
            weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
            floats = torch.rand(tokens), torch.rand(n), torch.rand(n)
            operands = [x, weight, *floats, torch.rand(tokens, n).to(dtype)]
            assert torch.equal(kernel(*map(guarded, operands), dtype), kernel(*operands, dtype))


def attention() -> None:
    """attention, likewise."""
    assert not cpu_library.ATTENTION.runs_on(detect(torch.device("cpu")))
    kernel = attention_cpu.KERNEL
    for queries, keys, d, e in itertools.product((1, 2, 16, 17, 33), (1, 5, 47, 49, 100), (1, 15, 64), (1, 17, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            rows = ((queries, d), (keys, d), (keys, e), (queries, keys))
            operands = [torch.randn(1, 2, *size).to(dtype) for size in rows]
            assert torch.equal(kernel(*map(guarded, operands), False, 1.0), kernel(*operands, False, 1.0))


def one_too_far() -> None:
    """What the guard is for: must not survive."""
    beyond = (ctypes.c_float * 4).from_address(guarded(torch.ones(3)).data_ptr())
    torch.frombuffer(beyond, dtype=torch.float32).sum()
