"""Files whole or not at all."""

import os
from pathlib import Path

import pytest

from qcompile.atomic_file import check_file, replacing, write_file
from qcompile.errors import ConfigError, GraphError


def test_a_file_is_written_with_the_usual_permissions(tmp_path: Path) -> None:
    write_file(tmp_path / "page", "α < β")
    assert (tmp_path / "page").read_text(encoding="utf-8") == "α < β"
    assert [path.name for path in tmp_path.iterdir()] == ["page"]
    (tmp_path / "other").write_text("")
    assert (tmp_path / "page").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page").write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"page cannot be written: No space left on device; choose another place"):
        write_file(tmp_path / "page", "new")
    assert (tmp_path / "page").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


@pytest.mark.parametrize("place", ["nowhere/page", "."])
def test_a_place_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        write_file(tmp_path / place, "text")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["nowhere/page", ".", "file/page"])
def test_a_place_is_checked_without_a_trace(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(ConfigError, match="cannot be written: .*; choose another place"):
        check_file(tmp_path / place)
    check_file(tmp_path / "file")
    check_file(tmp_path / "new")
    check_file("/dev/null")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_half_a_character_is_no_reason_to_fail(tmp_path: Path) -> None:
    write_file(tmp_path / "page", "a\ud800b")
    assert (tmp_path / "page").read_text() == "a?b"


def half_written(path: Path, raised: Exception) -> None:
    with replacing(path, GraphError) as partial:
        partial.write_text("half")
        raise raised


@pytest.mark.parametrize(("raised", "seen"), [(KeyError("x"), KeyError), (OSError(5, "broken"), GraphError)])
def test_a_block_that_fails_leaves_what_was_there(raised: Exception, seen: type[Exception], tmp_path: Path) -> None:
    (tmp_path / "page").write_text("old")
    with pytest.raises(seen):
        half_written(tmp_path / "page", raised)
    assert (tmp_path / "page").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


def test_a_link_stays_and_what_it_names_is_written(tmp_path: Path) -> None:
    (tmp_path / "page").write_text("old")
    (tmp_path / "link").symlink_to("page")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "page").read_text() == "new"


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    """As /dev/null and /dev/stdout stay devices."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_file(tmp_path / "pipe", "text")
        assert os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
