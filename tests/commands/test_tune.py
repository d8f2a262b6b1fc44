"""qcompile tune, with a clock that is not a GPU's: what is tried, what is kept, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
import torch
from checkpoints import float_folder

from qcompile import cli
from qcompile.commands import tune
from qcompile.errors import LoweringError
from qcompile.lowering.devices import device_of
from qcompile.lowering.target import Target
from qcompile.lowering.tiles import Tile, choose_tile, load
from qcompile.structure import load_structure

H200 = Target("cuda", 90, name="NVIDIA H200", processors=132)
SM90 = device_of(H200)
assert SM90 is not None


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_triton_version", lambda: "3.7")


def by_area(m: int, n: int, k: int, dtype: str, tile: Tile) -> float:
    return float("inf") if tile.swap else float(tile.block_m * tile.block_n + tile.split)


@pytest.mark.parametrize("m", [16, 64, 128, 8192])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_candidates_begin_with_the_heuristic_and_can_run(m: int, kind: str) -> None:
    assert SM90 is not None
    found = tune.candidates(m, 4096, 14336, kind, SM90)
    assert found[0] == choose_tile(m, 4096, 14336, kind, SM90)
    assert len(found) == len(set(found)) > 5
    assert all(tile.split == 1 or not tile.programs for tile in found)
    assert any(tile.split > 1 for tile in found) == (m <= 128)
    assert any(tile.programs for tile in found) == (m == 8192)
    with_tma = {dataclasses.replace(tile, tma=False) for tile in found if tile.tma}
    assert with_tma == {tile for tile in found if not tile.tma}, "each both ways"
    older = device_of(Target("cuda", 89))
    assert older is not None
    assert not any(tile.tma for tile in tune.candidates(m, 4096, 14336, kind, older))


def test_the_fastest_is_kept(table: None) -> None:
    lines: list[str] = []
    found = tune.tune([(4096, 4096), (64, 64), (64, 64)], [1, 5, 8192], "int8", H200, by_area, lines.append)
    assert [(row.m, row.n, row.k) for row in found.rows] == [
        (16, 4096, 4096), (None, 4096, 4096), (16, 64, 64), (None, 64, 64),
    ]  # fmt: skip
    for row in found.rows:
        m = row.m or 8192
        assert SM90 is not None
        assert row.n is not None
        assert row.k is not None
        tried = tune.candidates(m, row.n, row.k, "int8", SM90)
        assert by_area(m, row.n, row.k, "int8", row.tile) == min(by_area(m, 0, 0, "", tile) for tile in tried)
    assert found.device == "NVIDIA H200"
    assert found.source.startswith("measured 20")
    assert len(lines) == 4


def test_shapes_where_nothing_runs_are_left_out(table: None) -> None:
    def only_wide(m: int, n: int, k: int, dtype: str, tile: Tile) -> float:
        return float("inf") if n == 64 else 1.0

    found = tune.tune([(64, 64), (4096, 64)], [1], "fp8", H200, only_wide)
    assert [row.n for row in found.rows] == [4096]
    with pytest.raises(LoweringError, match="none did"):
        tune.tune([(64, 64)], [1], "fp8", H200, only_wide)


def test_a_models_shapes_are_those_of_its_merged_products(tmp_path: Path) -> None:
    config = float_folder(tmp_path / "m")
    assert config is None or config is not None
    model = load_structure(str(tmp_path / "m"))
    hidden, middle = model.config.hidden_size, model.config.intermediate_size
    size = hidden // model.config.num_attention_heads
    qkv = (model.config.num_attention_heads + 2 * model.config.num_key_value_heads) * size
    assert tune.shapes_of(model, "int8") == list(
        dict.fromkeys([(qkv, hidden), (hidden, hidden), (2 * middle, hidden), (hidden, middle)])
    )


def test_a_table_is_written_whole(table: None, tmp_path: Path) -> None:
    found = tune.tune([(64, 64)], [1], "int8", H200, by_area)
    tune.write(tmp_path / "t.json", found)
    assert load(tmp_path / "t.json") == found
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tune needs shapes to measure"),
        (["--shape", "4096"], "a shape must be N,K"),
        (["--shape", "0,16"], "a shape must be N,K"),
        (["--shape", "a,b"], "a shape must be N,K"),
        (["--shape", "16,16", "--tokens", "0"], "numbers of tokens must be at least 1"),
        (["--shape", "16,16", "--out", "no/such/folder/t.json"], "--out must be a file in a folder that exists"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--shape", "4096,4096"]) == 2
    assert "this machine has none" in capsys.readouterr().err


def test_a_wrong_result_is_seen() -> None:
    x, weight = torch.randint(-9, 9, (5, 8)).to(torch.int8), torch.randint(-9, 9, (7, 8)).to(torch.int8)
    operands = x, weight, torch.rand(5) + 0.1, torch.rand(7) + 0.1
    y = (x.float() @ weight.float().T * operands[2][:, None] * operands[3]).to(torch.bfloat16)
    assert tune._is_right(y, operands)
    y[-1, -1] += y.abs().max()
    assert not tune._is_right(y, operands)
