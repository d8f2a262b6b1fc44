"""Processes that meet, agree, and end together, whatever goes wrong in one of them."""

import pytest
import torch
from processes import together
from sharded import failing

from qcompile.errors import ConfigError, RankError
from qcompile.parallel import ranks
from qcompile.parallel.ranks import Ranks, joined


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", None), ("WORLD_SIZE", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        with joined() as alone:
            assert alone == Ranks()
            assert alone.first
            assert alone.same(lambda: "said") == "said"
            assert alone.device("cuda") == "cuda"
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("rank", [0, 1])
def test_one_failure_ends_all_and_is_told_once(rank: int) -> None:
    said = together(2, failing, rank, "here")
    assert said[rank] == f"ConfigError: process {rank} must be told why"
    assert said[1 - rank] == "OtherRankError: another process failed"


def test_a_failure_everywhere_is_told_once() -> None:
    said = together(2, failing, 0, "everywhere")
    assert sorted(one.partition(":")[0] for one in said) == ["ConfigError", "OtherRankError"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_all(rank: int) -> None:
    said = together(2, failing, rank, "killed")
    assert said[rank] == "ended without a word"
    assert said[1 - rank].startswith("RankError: the processes must stay connected; ")


def test_processes_that_cannot_meet_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RankError, match=r"^processes must be started by torchrun, and reach each other; .*MASTER_ADDR"):
        joined().__enter__()


def test_every_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(ranks.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ranks.torch.cuda, "set_device", chosen.append)
    assert Ranks(1, 3, 1, "").device("cuda") == "cuda:1"
    assert Ranks(1, 3, 1, "").device("cpu") == "cpu"
    assert chosen == [1]
    with pytest.raises(ConfigError, match="every process needs a GPU of its own; there are 2"):
        Ranks(2, 3, 2, "").device("cuda")
