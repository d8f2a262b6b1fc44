"""`qcompile tune`: measure the tiles for a model's products on this machine's GPU, and keep the fastest in a table."""

import argparse
import dataclasses
import datetime
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from qcompile import ops
from qcompile.errors import ConfigError, LoweringError
from qcompile.lowering.devices import Device, device_of
from qcompile.lowering.target import Target, detect
from qcompile.lowering.tiles import BUCKETS, Row, Table, Tile, bucket, choose_tile

Shape = tuple[int, int]
# What is tried, besides the tile that would be taken without measuring: block_m, block_n, block_k, warps, stages, swap.
SMALL = (
    (16, 32, 256, 4, 4, True), (16, 64, 256, 4, 4, True), (16, 64, 512, 4, 3, True), (16, 128, 256, 4, 3, True),
    (16, 64, 128, 4, 5, False), (16, 64, 256, 4, 4, False), (32, 64, 256, 4, 4, True), (64, 64, 256, 4, 3, False),
)  # fmt: skip
LARGE = (
    (64, 64, 128, 4, 4, False), (64, 128, 128, 4, 4, False), (128, 64, 128, 4, 4, False), (64, 256, 128, 8, 3, False),
    (128, 128, 128, 8, 3, False), (128, 128, 128, 8, 4, False), (128, 256, 128, 8, 3, False),
    (128, 256, 128, 8, 4, False), (256, 128, 128, 8, 3, False), (128, 256, 64, 8, 4, False),
)  # fmt: skip


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser."""
    parser = commands.add_parser("tune", help="measure kernel tiles for a model on this GPU; writes a table")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder of a Hugging Face model; weights not read")
    parser.add_argument("--shape", action="append", default=[], metavar="N,K", help="a weight's shape; repeatable")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 32, 128, 512, 2048, 8192], metavar="M")
    parser.add_argument("--dtype", default="int8", choices=tuple(ops.TORCH_DTYPES))
    parser.add_argument("--out", default="tiles.json", metavar="FILE", help="the table (default tiles.json)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and write. Raises ConfigError, LoweringError."""
    shapes = [_shape(text) for text in arguments.shape]
    if any(m < 1 for m in arguments.tokens):
        raise ConfigError(f"numbers of tokens must be at least 1; got {arguments.tokens}")
    if arguments.model is None and not shapes:
        raise ConfigError("tune needs shapes to measure; got none; give MODEL or --shape N,K")
    if not Path(arguments.out).parent.is_dir():
        raise ConfigError(f"--out must be a file in a folder that exists; got {arguments.out}")
    target = _gpu(arguments.dtype)
    if arguments.model is not None:
        from qcompile.structure import load_structure

        model = load_structure(arguments.model, trust_remote_code=arguments.trust_remote_code)
        shapes += shapes_of(model, arguments.dtype)
    table = tune(
        shapes, arguments.tokens, arguments.dtype, target, time_tile, lambda line: print(line, file=sys.stderr)
    )
    write(Path(arguments.out), table)
    print(f'{len(table.rows)} tiles written to {arguments.out}; use them with options={{"tiles": "{arguments.out}"}}')


def _shape(text: str) -> Shape:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"a shape must be N,K, such as 4096,14336; got {text!r}")
    return int(parts[0]), int(parts[1])


def _gpu(dtype: str) -> Target:
    from qcompile.lowering import scaled_mm_triton

    if not torch.cuda.is_available():
        raise LoweringError("tune measures on a GPU; this machine has none that torch can use; see qcompile doctor")
    target = detect(torch.device("cuda", torch.cuda.current_device()))
    example = torch.empty(16, 64, dtype=ops.TORCH_DTYPES[dtype], device="meta")
    if reason := scaled_mm_triton.runs_on(target) or scaled_mm_triton.takes(target, example, example):
        raise LoweringError(f"tune measures Triton kernels; here that {reason}")
    return target


def shapes_of(model: Any, dtype: str) -> list[Shape]:
    """(N, K) of every product that the backend would make of a model, merged siblings as one, each once."""
    from qcompile import passes
    from qcompile.capture import capture_call
    from qcompile.config import Config
    from qcompile.explanation import example_call

    config = Config.from_options({"dtype": dtype})
    found: dict[Shape, None] = {}
    for captured in capture_call(model, example_call(model)):
        graph, _ = passes.quantizing(config).run(captured.graph)
        for node in graph.graph.find_nodes(op="call_function", target=ops.scaled_mm):
            n, k = node.args[1].meta["val"].shape
            found[int(n), int(k)] = None
    if not found:
        raise ConfigError("the model must have linears to quantize; this one has none; give --shape N,K")
    return list(found)


def candidates(m: int, n: int, k: int, kind: str, device: Device) -> list[Tile]:
    """Tiles worth measuring; the heuristic one first. kind: "int8" or "fp8"."""
    first = choose_tile(m, n, k, kind, device)
    found = [first, dataclasses.replace(first, tma=device.tma)]
    for block_m, block_n, block_k, warps, stages, swap in SMALL if m <= 64 else LARGE:
        tile = Tile(block_m, block_n, block_k, warps, stages, swap=swap)
        if _operand_bytes(tile) > device.shared or (m <= 64 and block_m > max(16, bucket(m))):
            continue
        tiles = -(-m // block_m) * -(-n // block_n)
        splits = [s for s in (1, 2, 4, 8) if s == 1 or (s * tiles <= 4 * device.processors and s * block_k <= k)]
        forms = [dataclasses.replace(tile, split=split) for split in splits]
        if m > 64 and tiles > device.processors:
            forms.append(dataclasses.replace(tile, programs=device.processors))
        found += forms
        if device.tma:
            found += [dataclasses.replace(form, tma=True) for form in forms]
    return list(dict.fromkeys(found))


def _operand_bytes(tile: Tile) -> int:
    return (tile.block_m + tile.block_n) * tile.block_k * max(1, tile.stages - 1)


def tune(
    shapes: Iterable[Shape],
    tokens: Sequence[int],
    dtype: str,
    target: Target,
    time: Callable[[int, int, int, str, Tile], float],
    told: Callable[[str], None] = lambda line: None,
) -> Table:
    """The fastest tile for every shape and number of tokens. time: microseconds, or inf for a tile that fails."""
    device = device_of(target)
    assert device is not None
    kind = "int8" if dtype == "int8" else "fp8"
    rows = []
    for n, k in dict.fromkeys(shapes):
        for m in sorted({bucket(m) for m in tokens}):
            measured = {tile: time(m, n, k, dtype, tile) for tile in candidates(m, n, k, kind, device)}
            best = min(measured, key=lambda tile: measured[tile])
            if measured[best] == float("inf"):
                told(f"M ≤ {m}, N = {n}, K = {k}: no tile ran; left to the heuristic")
                continue
            rows.append(Row(kind, m if m < BUCKETS[-1] else None, n, k, best))
            heuristic = next(iter(measured.values()))
            told(f"M ≤ {m}, N = {n}, K = {k}: {measured[best]:.1f} µs, heuristic {heuristic:.1f} µs")
    if not rows:
        raise LoweringError("tune must find a tile that runs; none did; see the lines above")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    source = f"measured {today} with torch {torch.__version__}, Triton {_triton_version()}"
    return Table(target.name or str(target), source, tuple(rows))


def write(path: Path, table: Table) -> None:
    """The table in a file, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(table.to_json(), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"the table must be written to {path}; {error.strerror}; choose another --out") from None


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def time_tile(m: int, n: int, k: int, dtype: str, tile: Tile) -> float:
    """Microseconds of one product on this machine's GPU; inf if the tile does not run, or not correctly.

    Operands are rotated through more memory than the cache holds. A split product is timed with the kernel that
    Inductor makes of its sum and epilogue.
    """
    from qcompile.bench.gpu_timing import copies, microseconds
    from qcompile.lowering import scaled_mm_kernel  # noqa: F401  (defines the operator)

    cache = torch.cuda.get_device_properties().L2_cache_size
    sets = [_operands(m, n, k, dtype, seed) for seed in range(copies(n * k, cache))]
    try:
        with torch._dynamo.config.patch(recompile_limit=10_000):
            call = torch.compile(_call, dynamic=False, fullgraph=True) if tile.split > 1 else _call
            if not _is_right(call(sets[0], tile.to_ints()), sets[0]):
                return float("inf")
            return microseconds([lambda s=s: call(s, tile.to_ints()) for s in sets])  # type: ignore[misc]
    except Exception:  # out of shared memory or registers, or the compiler's own: another tile will do
        return float("inf")


def _operands(m: int, n: int, k: int, dtype: str, seed: int) -> tuple[torch.Tensor, ...]:
    random = torch.Generator("cuda").manual_seed(seed)
    scales = torch.full((m,), 1e-2, device="cuda"), torch.full((n,), 1e-2, device="cuda")
    if dtype == "int8":
        x, weight = (
            torch.randint(-127, 128, (rows, k), generator=random, device="cuda").to(torch.int8) for rows in (m, n)
        )
    else:
        x, weight = (
            torch.randn(rows, k, generator=random, device="cuda").to(ops.TORCH_DTYPES[dtype]) for rows in (m, n)
        )
    return x, weight, *scales


def _call(operands: tuple[torch.Tensor, ...], tile: list[int]) -> torch.Tensor:
    result: torch.Tensor = torch.ops.qcompile_triton.scaled_mm(*operands, None, None, "", torch.bfloat16, [0, *tile])
    return result


def _is_right(y: torch.Tensor, operands: tuple[torch.Tensor, ...]) -> bool:
    """A look at the corners, where a wrong mask would show."""
    x, weight, x_scale, weight_scale = (t.to(torch.float64) for t in operands)
    rows, columns = [0, len(x) - 1], [0, len(weight) - 1]
    expected = (x[rows] @ weight[columns].T) * x_scale[rows, None] * weight_scale[columns]
    error = (y[rows][:, columns].to(torch.float64) - expected).norm() / expected.norm().clamp(min=1e-30)
    return bool(error < 2e-2)
