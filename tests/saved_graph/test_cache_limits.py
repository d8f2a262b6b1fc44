"""What is not kept, and that no damage to what was kept does harm."""

from pathlib import Path
from typing import Any

import pytest
import torch
from caching import entries, events, first_call, new_process
from graphs import ReluMLP
from torch import Tensor, nn

from qcompile.saved_graph import cache as graph_cache

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("damage", ["empty", "half", "no entries", "another format", "unknown operator"])
def test_a_damaged_entry_is_written_anew(damage: str, cache: Path, told: list[str]) -> None:
    model, x = ReluMLP(), torch.randn(4, 16)
    expected = first_call(model, x)
    (entry,) = entries(cache)
    whole = entry.read_bytes()
    broken = {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "no entries": b"PK\x05\x06" + bytes(18),
        "another format": whole.replace(b"qcompile-compiled-1", b"qcompile-compiled-0"),
        "unknown operator": whole.replace(b"aten.relu.default", b"aten.uler.default"),
    }[damage]
    assert broken != whole
    entry.write_bytes(broken)
    events()
    assert torch.equal(first_call(model, x), expected)
    assert events() == {"miss": 1, "kept": 1}
    assert "is written anew" in told[0]
    assert entry.read_bytes() == whole


class Aliasing(nn.Module):
    """Returns a view of its input, which AOTAutograd makes anew around the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, 1:], self.linear(x)


def test_what_needs_more_than_a_graph_is_not_kept(cache: Path, told: list[str]) -> None:
    model, x = Aliasing(), torch.randn(4, 16)
    for _ in range(2):
        view, _ = first_call(model, x)
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert events() == {"miss": 1, "not_kept": 1}
    assert "needs more than the graph" in told[-1]
    assert not entries(cache)


class Rotated(nn.Module):
    """Has a constant of a dtype that the file's format does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * torch.tensor([1 + 2j], dtype=torch.complex128).real.float()
        return y


def test_what_the_file_cannot_hold_is_not_kept(cache: Path, told: list[str]) -> None:
    assert first_call(Rotated(), torch.randn(4, 16)).shape == (4, 16)
    assert events() == {"miss": 1, "not_kept": 1}
    assert "torch.complex128" in told[-1]
    assert not entries(cache)


@pytest.mark.parametrize("options", [{"verify": True}, {"dump": "dumped"}], ids=str)
def test_watched_passes_run(
    options: dict[str, Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first_call(ReluMLP(), torch.randn(4, 16), **options)
    assert events() == {}
    assert not entries(cache)


def test_switches(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = ReluMLP(), torch.randn(4, 16)
    with monkeypatch.context() as patch:
        patch.setenv(graph_cache.SWITCH, "0")
        first_call(model, x)
    with torch._inductor.config.patch(fx_graph_cache=False):
        first_call(model, x)
    monkeypatch.setenv("QCOMPILE_DEBUG", "time")
    first_call(model, x)
    assert events() == {}
    assert not entries(cache)


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path, told: list[str]) -> None:
    cache.write_text("a file where the folder should be")
    first_call(ReluMLP(), torch.randn(4, 16))
    assert events() == {"miss": 1, "not_kept": 1}
    assert "is not kept" in told[-1]


@pytest.mark.parametrize("broken", ["backend.key_of", "saved_graph.cache.describe"])
def test_an_error_of_the_cache_is_no_error_of_the_model(
    broken: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(f"qcompile.{broken}", fail)
    model, x = ReluMLP(), torch.randn(4, 16)
    assert first_call(model, x).shape == (4, 16)
    assert not entries(cache)


def test_symbolic_sizes_are_not_kept(cache: Path) -> None:
    new_process()
    model = torch.compile(ReluMLP(), backend="w8a8", options={"inner": "eager"}, dynamic=True)
    with torch.no_grad():
        model(torch.randn(4, 16))
    assert events() == {}
    assert not entries(cache)


def test_gradients_are_refused_as_ever() -> None:
    model, x = ReluMLP(), torch.randn(4, 16)
    first_call(model, x)
    new_process()
    compiled = torch.compile(model, backend="w8a8", options={"inner": "eager"})
    with pytest.raises(Exception, match="inference only"):
        compiled(x)
