"""A folder appears whole, or not at all, whatever happens while it is written."""

import errno
from pathlib import Path
from typing import Any

import pytest

from qcompile.atomic_folder import atomic_folder, check_target
from qcompile.errors import CheckpointError


def write(target: Path, text: str = "new", *, overwrite: bool = False) -> None:
    with atomic_folder(target, overwrite=overwrite, last="config.json") as folder:
        (folder / "data").write_text(text)
        (folder / "config.json.partial").write_text(text)


def check(target: Path, **options: Any) -> None:
    check_target(target, last="config.json", **options)


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_was_written_is_there_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "out")
    assert listing(tmp_path / "deep") == {"out"}
    assert listing(tmp_path / "deep" / "out") == {"data", "config.json"}
    assert (tmp_path / "deep" / "out").stat().st_mode & 0o755 == 0o755


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert listing(tmp_path / "out") == {"data", "config.json"}


def test_what_exists_stays(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(CheckpointError, match="--overwrite"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "data").read_text() == "old"
    assert listing(tmp_path) == {"out"}


def test_what_appears_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def race() -> None:
        with atomic_folder(target, overwrite=False, last="c") as folder:
            (folder / "c.partial").write_text("new")
            target.mkdir()
            (target / "data").write_text("theirs")

    with pytest.raises(CheckpointError, match="must stay empty until it is written; .* nothing was written"):
        race()
    assert listing(target) == {"data"}
    assert listing(tmp_path) == {"out"}


def test_overwriting_replaces_the_whole(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "more").write_text("old")
    write(tmp_path / "out", overwrite=True)
    assert listing(tmp_path / "out") == {"data", "config.json"}
    assert listing(tmp_path) == {"out"}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        check(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    write(tmp_path / "out", "old")

    def fill() -> None:
        with atomic_folder(tmp_path / "out", overwrite=True, last="config.json") as folder:
            (folder / "data").write_text("new")
            raise OSError(number, "no")

    with pytest.raises(CheckpointError, match="needs more space than there is .* nothing was written"):
        fill()
    assert listing(tmp_path) == {"out"}
    assert (tmp_path / "out" / "data").read_text() == "old"


def test_other_errors_go_through_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out", overwrite=False, last="c"):
        _ = 1 / 0
    assert listing(tmp_path) == set()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "file" / "out")


@pytest.mark.parametrize("place", ["file/out", "/proc/out", "o" * 250])
def test_a_place_that_cannot_be_written_is_known_before(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written: .*; choose another place"):
        check(tmp_path / place, overwrite=False)
    check(tmp_path / "deep" / "out", overwrite=False)
    assert listing(tmp_path) == {"file"}


@pytest.mark.parametrize("place", [".", "..", "../here", "/"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_folder_that_one_is_in_stays(
    tmp_path: Path, place: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="that can be replaced; .*; choose another"):
        check(Path(place), overwrite=overwrite)
    check(Path("../here/out"), overwrite=overwrite)
    assert listing(tmp_path) == {"here"}
    assert listing(tmp_path / "here") == set()


@pytest.mark.parametrize(("out", "reason"), [
    ("models/source", "is .*/link, which is read"), ("models", "holds .*/link, which is read"),
    ("models/source/texts/a.txt/..", "holds .*/texts/a.txt, which is read"),
])  # fmt: skip
def test_what_the_new_content_comes_from_stays(tmp_path: Path, out: str, reason: str) -> None:
    read = [tmp_path / "link", tmp_path / "models" / "source" / "texts" / "a.txt"]
    read[1].parent.mkdir(parents=True)
    for folder in (tmp_path / "models", tmp_path / "models" / "source", read[1].parent):
        (folder / "config.json").write_text("{}")
    read[1].write_text("a")
    read[0].symlink_to("models/source")
    with pytest.raises(CheckpointError, match=f"that can be replaced; .* {reason}; choose another"):
        check(tmp_path / out, overwrite=True, read=read)
    with pytest.raises(CheckpointError, match=reason), atomic_folder(
        tmp_path / out, overwrite=True, last="config.json", read=read
    ):  # fmt: skip
        raise AssertionError
    check(tmp_path / "models" / "source" / "quantized", overwrite=True, read=read)
    assert read[1].read_text() == "a"


def test_only_what_was_written_here_is_overwritten(tmp_path: Path) -> None:
    """Whoever means another folder than this one still has what was in it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(CheckpointError, match="only a folder with a config.json is overwritten; .* empty it yourself"):
        write(tmp_path / "home", overwrite=True)
    assert listing(tmp_path / "home") == {"thesis.txt"}


def test_links_in_a_circle_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(CheckpointError, match="cannot be written"):
        check(tmp_path / "a", overwrite=False)


def test_a_mount_point_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the folder that a container gets for its output."""
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(CheckpointError, match="is a mount point"):
        check(tmp_path, overwrite=False)


def test_what_cannot_be_replaced_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    rename = Path.rename

    def refusing(path: Path, target: Path) -> Path:
        if path.name.startswith(".out.partial-"):
            raise OSError(errno.EBUSY, "busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(CheckpointError, match="cannot be written: .*busy"):
        write(tmp_path / "out", overwrite=True)
    assert listing(tmp_path) == {"out"}
    assert (tmp_path / "out" / "data").read_text() == "old"


def test_a_link_stays_and_what_it_names_is_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    for text in ("first", "second"):
        write(tmp_path / "link", text, overwrite=text == "second")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "out" / "data").read_text() == text
    assert listing(tmp_path) == {"link", "out"}


def test_the_file_that_readers_need_comes_last(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out", overwrite=False, last="config.json") as folder:
        (folder / "config.json.partial").write_text("x")
        assert folder.name.startswith(".out.partial-")
        assert not (folder / "config.json").exists()
    assert listing(tmp_path / "out") == {"config.json"}
