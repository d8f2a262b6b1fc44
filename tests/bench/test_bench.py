"""The benchmark's machinery: workers in turns, figures per case, errors in one line. Speeds themselves are no test."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from transformers import StaticCache

from qcompile.bench import bench as bench_module
from qcompile.bench.bench import Timing, bench, table, to_json
from qcompile.errors import CheckpointError, ConfigError

DEMO = str(Path(__file__).parents[2] / "qcompile" / "demo_model")
CASES = ["decode, batch 1", "prefill 128"]


def timing(variant: str, milliseconds: float) -> Timing:
    seconds = [milliseconds / 1e3 * factor for factor in (0.9, 1.0, 1.1, 5.0, 1.0)]
    return Timing(variant, {"decode, batch 1": seconds}, {"decode, batch 1": 2.0}, {"decode, batch 1": 0.5}, 3 * 2**20)


def test_workers_are_timed_in_turns_and_stopped() -> None:
    told: list[str] = []
    timings = bench(DEMO, variants=["eager bf16"], cases=CASES, rounds=3, threads=1, told=told.append)
    (one,) = timings
    assert one.variant == "eager bf16"
    assert {case: len(seconds) for case, seconds in one.seconds.items()} == dict.fromkeys(CASES, 3)
    assert all(second > 0 for seconds in one.seconds.values() for second in seconds)
    assert set(one.cold) == set(one.warm) == set(CASES)
    assert one.peak_memory > 50 * 2**20
    compiling = [f"eager bf16: compiling for {case}, {state}" for state in ("cold", "warm") for case in CASES]
    assert told == [*compiling, *(f"timing {case}" for case in CASES)]
    assert not multiprocessing.active_children()


def test_the_second_process_finds_what_the_first_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each variant gets an empty cache of its own, used twice and removed."""
    folders: list[str] = []
    start = bench_module._Worker.__init__

    def watched(self: object, model: str, variant: str, threads: int, cache: str) -> None:
        folders.append(cache)
        start(self, model, variant, threads, cache)  # type: ignore[arg-type]

    monkeypatch.setattr(bench_module._Worker, "__init__", watched)
    monkeypatch.setattr(bench_module.tempfile, "tempdir", str(tmp_path))
    bench(DEMO, variants=["eager bf16", "eager bf16"], cases=CASES[:1], rounds=2, threads=1)
    assert len(folders) == 4
    assert folders[0] == folders[1] != folders[2] == folders[3]
    assert list(tmp_path.iterdir()) == []


def test_decode_steps_do_not_run_out_of_cache() -> None:
    runner = bench_module._Runner(DEMO, "eager bf16")
    runner.answer("compile", CASES[0])
    cache = next(value for value in runner._calls[CASES[0]].values() if isinstance(value, StaticCache))
    keys = cache.layers[0].keys
    before = keys.clone()
    for _ in range(bench_module.CACHE_LENGTH):
        runner._call(CASES[0])
    written = (keys != before).any(-1).any(1).any(0)
    assert written.nonzero().flatten().tolist() in ([], [bench_module.CACHE_LENGTH // 2])
    assert cache.get_seq_length() == bench_module.CACHE_LENGTH // 2 + 1


def test_named_mixtures_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_module.MIXTURES, "tiny", (32, 16, 2, 4, 2, 64, 6, 2))
    model = bench_module._build("tiny", torch.bfloat16)
    experts = model.model.layers[1].mlp.experts
    assert experts.gate_up_proj.shape == (6, 2 * 16, 32)
    assert model.config.num_experts_per_tok == 2
    assert model.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConfigError, match="llama-1b, moe-330m, tiny, or a model's folder"):
        bench("no such model")


def test_the_table_quotes_medians_spread_and_ratios() -> None:
    text = table([timing("inductor bf16", 20.0), timing("w8a8 int8", 10.0)])
    header, _, row, cold, warm, memory = text.splitlines()
    assert header == "| case | inductor bf16 | w8a8 int8 |"
    assert row.startswith("| decode, batch 1 | 20.00 ms (")
    assert "2.00× |" in row
    assert row.count("×") == 1
    assert cold == "| first calls, cold | 2.0 s | 2.0 s |"
    assert warm == "| first calls, warm | 0.5 s | 0.5 s |"
    assert memory == "| peak memory | 3 MiB | 3 MiB |"


def test_json_names_the_machine() -> None:
    parsed = json.loads(to_json([timing("w8a8 int8", 10.0)]))
    assert {"cpu", "torch", "python", "threads"} <= set(parsed["machine"])
    assert parsed["timings"][0]["variant"] == "w8a8 int8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "llama-9b"}, "model must be one of llama-100m"),
        ({"model": "llama-100m", "variants": ["eager int4"]}, "variant must be one of eager bf16"),
        ({"model": "llama-100m", "cases": ["prefill 3"]}, "case must be one of decode"),
    ],
)
def test_mistakes_are_named_before_anything_runs(arguments: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ConfigError, match=message):
        bench(**arguments)
    assert not multiprocessing.active_children()


def test_a_variant_that_cannot_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="variant eager bf16 cannot run here"):
        bench(str(tmp_path), variants=["eager bf16"], cases=["prefill 128"], rounds=1)
    assert not multiprocessing.active_children()


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((Path(DEMO) / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(CheckpointError, match="pickle"):
        bench_module._build(str(tmp_path), torch.float32)
